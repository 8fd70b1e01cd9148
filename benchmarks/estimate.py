"""The page of `decode.py --estimate`: what a decoding step of attention must take at least, beside what was
measured on an H200 (docs/gpu).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shapes import SHAPES, config_of, modes_of

from mha2mla_vlm.bench.roofline import CARDS, Limits, Work, latent_work, limits, original_work
from mha2mla_vlm.config import AttentionSizes, LayerSpec, MLAConfig

CONTEXTS = (1024, 4096, 16384, 65536, 131072)
BATCHES = (1, 32)
SHARE, LAYERS, MICRO = 0.125, 28, 1e6
SHORT = (16384, 131072)  # contexts of the table of cards
D_KV = 32  # of the mode that benchmarks/decode.py measures, with as many rope dims
WRITE, UNPACKED = f"write, d_kv {D_KV}", "read 128, by channel, unpacked first"
MODES = ("write", WRITE, "write, by channel", "read 128", "read 32", "read 128, by channel", UNPACKED)
Key = tuple[str, str, int, int]  # shape, mode, batch, context
INTRODUCTION = """\
Made by `python benchmarks/decode.py --estimate`; nothing on this page but "measured" was run. Attention of
one new token in one layer, bfloat16, from queries to the heads' outputs, without what a step makes once for
all layers (tables of RoPE). The formulas and the sources of the cards' peaks are in
`src/mha2mla_vlm/bench/roofline.py`: the longest of the time that the bytes take at the card's bandwidth,
that the products take at the peak of its tensor cores, and that softmax, rotation, rounding and unpacking
take at the rates of its vector units, and 3.5 microseconds a kernel. Modes have 12.5% of the cache
(`write`, `read R`), half of that (`by channel`: 2.25 channels for each 16-bit one of that size) or 25%
(`d_kv 32`, R = 32). "Unpacked first" is as the Triton kernels do it: bytes are made numbers in a kernel of
their own, which are written and read again; `by channel` alone is a kernel that would not. Microseconds;
ratios are the original's time over ours. "Of the limit" is the estimate over what was measured: 100% is a
kernel that cannot be better, and more than 100% says that a kernel in a graph costs less than 3.5
microseconds."""


class Estimate(NamedTuple):
    """One row: whose, and what a card needs for it and for the original."""

    key: Key
    bytes: int  # of the cache of a layer
    ours: Limits
    original: Limits


def spec_of(shape: str, mode: str) -> LayerSpec:
    """What a layer is in a mode."""
    if mode == WRITE:
        heads = SHAPES[shape][1]["num_key_value_heads"]
        mla: dict[str, Any] = {"qk_rope_head_dim": D_KV, "kv_lora_rank": D_KV * heads}
    else:
        mla = modes_of(shape, SHARE, 1)["read 128, by channel" if mode == UNPACKED else mode]
    spec = MLAConfig(modalities=("text", "vision"), **mla).layer(0)
    assert spec is not None, "no mode leaves a layer as it was"
    return spec


def estimates(card: str) -> Iterator[Estimate]:
    """All rows of a card."""
    for shape in SHAPES:
        sizes = AttentionSizes.of(config_of(shape, LAYERS))
        for batch in BATCHES:
            for context in CONTEXTS:
                for mode in MODES:
                    spec, how = spec_of(shape, mode), {"unpacked_first": mode == UNPACKED}
                    works: list[Work] = [
                        latent_work(spec, sizes, context, batch, **how),
                        original_work(sizes, context, batch),
                    ]
                    held = batch * context * spec.token_bytes(sizes, 2)
                    ours, original = (limits(work, CARDS[card]) for work in works)
                    yield Estimate((shape, mode, batch, context), held, ours, original)


def measured(folder: Path) -> dict[Key, tuple[float, float]]:
    """Seconds of the original and ours, by row, that `make gpu` wrote to `folder`."""
    found: dict[Key, tuple[float, float]] = {}
    for path in sorted(folder.glob("attention/*.json")):
        for row in json.loads(path.read_text())["rows"]:
            ours = row["ms"] - row["shared_ms"] / LAYERS
            key = (row["shape"], row["mode"], row["batch"], row["context"])
            found[key] = row["original_ms"] / 1e3, ours / 1e3
    for path in sorted(folder.glob(f"layers/*-{D_KV}.json")):
        result = json.loads(path.read_text())
        for row in result["rows"]:
            best = row["attention_seconds_original"][row["attention_baseline"]][0]
            key = (result["shape"], WRITE, row["batch"], row["context"])
            found[key] = best, row["attention_seconds"][0]
    return found


def page(folder: Path) -> str:
    """The page: all rows of an H200 beside what was measured there, and the ratios of all cards."""
    kept = measured(folder)
    text = ["# Decoding attention: estimated and measured", "", INTRODUCTION, "", "## H200", ""]
    columns = ("shape", "batch", "tokens", "mode", "MB a layer", "bytes", "products", "vector", "kernels")
    columns += ("estimate", "original", "ratio", "measured", "original", "ratio", "of the limit")
    text += [f"| {' | '.join((*columns, 'original'))} |", f"|{'---|' * (len(columns) + 1)}"]
    text += [_row(estimate, kept.get(estimate.key)) for estimate in estimates("H200")]
    return "\n".join([*text, "", *_cards()]) + "\n"


def _row(estimate: Estimate, found: tuple[float, float] | None) -> str:
    (shape, mode, batch, context), ours, original = estimate.key, estimate.ours, estimate.original
    cells = [shape, batch, f"{context:,}", mode, f"{estimate.bytes / 1e6:.1f}"]
    cells += [f"{MICRO * seconds:.1f}" for seconds in (*ours, ours.seconds, original.seconds)]
    cells.append(f"{original.seconds / ours.seconds:.2f}")
    if found is None:
        cells += ["-"] * 5
    else:
        theirs, own = found
        cells += [f"{MICRO * own:.1f}", f"{MICRO * theirs:.1f}", f"{theirs / own:.2f}"]
        cells += [f"{ours.seconds / own:.0%}", f"{original.seconds / theirs:.0%}"]
    return f"| {' | '.join(map(str, cells))} |"


def _cards() -> Iterator[str]:
    """Estimated ratios of all cards, at two lengths."""
    rows: dict[Key, list[str]] = {}
    for card in CARDS:
        for key, _, ours, original in estimates(card):
            if key[3] in SHORT:
                rows.setdefault(key, []).append(f"{original.seconds / ours.seconds:.2f}")
    yield from ["## Estimated ratios of cards", ""]
    yield f"| shape | batch | tokens | mode | {' | '.join(CARDS)} |"
    yield f"|{'---|' * (4 + len(CARDS))}"
    for (shape, mode, batch, context), ratios in rows.items():
        yield f"| {shape} | {batch} | {context:,} | {mode} | {' | '.join(ratios)} |"
