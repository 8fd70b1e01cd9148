"""Decoding attention over keys rotated at read, at write, and the original's, at the 7B models' shapes.

    python benchmarks/decode_at_read.py                     # all shapes, an eighth of the cache
    python benchmarks/decode_at_read.py --shape qwen2.5-vl-7b --contexts 16384 --modes "read 128"

Random weights and caches; contexts are text, images (32 by 32 tokens where RoPE is multimodal) and text.
`read R` rotates R dims of a head when they are read, `write` has a quarter of the bytes in rotated keys that
are cached. Ratios are against the fastest way that PyTorch has for the original, timed in turn in the same
run; `made` is `read` with all keys made of latents, without interpolation. `by channel` has half the bytes in
channels of 16, 8, 4 and 2 bits, half as many again; `as many in 16 bits` has their number. What a step makes
once for all layers is counted as if 28 of them shared it. Results go to OUT.
"""

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from shapes import HEAD_DIM, SHAPES, models_of, modes_of

from mha2mla_vlm.bench.layers import LATER, OURS, Rows, best_dense, random_caches, time_attention
from mha2mla_vlm.utils.machine import device_name

OUT = Path(__file__).parents[1] / "docs" / "decode" / "read"
LAYERS = 28  # that share what a step makes once: tables of RoPE and the plan


def measure(given: argparse.Namespace, shape: str) -> list[dict[str, Any]]:
    """Rows of a shape: for each context and mode the seconds of a layer and the ratio to the original."""
    rows = []
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    how = {"seconds": given.seconds, "clock": time.thread_time if given.cpu_time else time.perf_counter}
    numbers = 2 * HEAD_DIM * SHAPES[shape][1]["num_key_value_heads"]
    for context in given.contexts:
        layers = int(given.most_gigabytes * 1e9 / (given.batch * context * numbers * dtype.itemsize))
        layers = max(1, min(given.layers, layers))
        for mode, mla in modes_of(shape, given.budget, layers).items():
            if not is_chosen(mode, given.modes):
                continue
            _, converted = models_of(shape, layers, mla, device, dtype)
            dense, latent = random_caches(converted, context, given.batch)
            row = {"shape": shape, "context": context, "batch": given.batch, "mode": mode, "layers": layers}
            times = time_attention(converted, dense, latent, **how)
            best, (ours, shared) = best_dense(times), of_layer(times, layers)
            row |= {"baseline": best, "original_ms": 1e3 * times[best].median / layers}
            row |= {"ms": 1e3 * ours, "shared_ms": 1e3 * shared, "ratio": times[best].median / layers / ours}
            if mode.startswith("read") and context <= given.made_up_to:
                times = time_attention(converted, dense, latent, **how, interpolate=False)
                row["made_ratio"] = times[best].median / layers / of_layer(times, layers)[0]
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def is_chosen(mode: str, names: list[str] | None) -> bool:
    """Whether a mode is among `names`, by all of its name or its first word; all are without names."""
    return names is None or mode in names or mode.split()[0] in names


def of_layer(times: Rows, layers: int) -> tuple[float, float]:
    """Seconds of a layer with its share of what one makes for all, and those of that, once a step."""
    if LATER not in times:
        return times[OURS].median / layers, 0.0
    shared = max(0.0, times[OURS].median - times[LATER].median)
    return times[LATER].median / layers + shared / LAYERS, shared


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table of results."""
    of = {True: "CPU time of one thread", False: "wall time"}
    where = [
        f"{r['device']}, {r['dtype']}, torch {r['torch']}, {of[r['cpu_time']]}, {r['date']}: `{r['command']}`"
        for r in results
    ]
    lines = [
        "| dtype | shape | batch | tokens | rotated | ms | once a step, ms | original, ms | ratio | "
        "all keys made |",
        f"|{10 * '---|'}",
    ]
    for result in results:
        for row in result["rows"]:
            made = f"{row['made_ratio']:.2f}" if "made_ratio" in row else "-"
            cells = [result["dtype"], row["shape"], row.get("batch", 1), f"{row['context']:,}", row["mode"]]
            cells += [f"{row[name]:.3g}" for name in ("ms", "shared_ms", "original_ms")]
            cells += [f"{row['ratio']:.2f}", made]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n\n".join(["\n".join(dict.fromkeys(where)), "\n".join(lines)]) + "\n"


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES)[:2])
    parser.add_argument("--budget", type=float, default=0.125)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--most-gigabytes", type=float, default=0.6, help="of the original's caches")
    parser.add_argument("--made-up-to", type=int, default=16384, help="tokens to measure without the plan")
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 4096, 16384, 65536])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each comparison")
    parser.add_argument("--modes", nargs="+", help="names of modes to measure, or `read` for all of it")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, for a machine that is shared")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("-o", "--output", type=Path, default=OUT)
    given = parser.parse_args()
    modes = list(modes_of(given.shape[0], given.budget, given.layers))
    if given.modes is not None and not all(any(is_chosen(m, [name]) for m in modes) for name in given.modes):
        parser.error(f"--modes {given.modes}: give some of {', '.join(map(repr, modes))}, or read")
    if given.cpu_time:
        torch.set_num_threads(1)
    given.output.mkdir(parents=True, exist_ok=True)
    for shape in given.shape:
        result = {"rows": measure(given, shape), "device": device_name(torch.device(given.device))}
        result |= {"dtype": given.dtype, "torch": torch.__version__, "budget": given.budget}
        result |= {"cpu_time": given.cpu_time, "command": " ".join(sys.argv)}
        result |= {"date": datetime.date.today().isoformat(), "layers": given.layers}
        batch = f"-batch-{given.batch}" if given.batch > 1 else ""
        (given.output / f"{shape}-{given.dtype}{batch}.json").write_text(json.dumps(result, indent=1) + "\n")
    kept = [json.loads(path.read_text()) for path in sorted(given.output.glob("*.json"))]
    (given.output / "README.md").write_text(table(kept))


if __name__ == "__main__":
    main()
