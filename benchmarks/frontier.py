"""Quality at equal real bytes of the cache: ours, the published method, and what else makes a cache small.

    python benchmarks/frontier.py                    # an hour or two on one core; resumes
    python benchmarks/frontier.py --models llava --samples 20 --rows /tmp/rows.jsonl -o /tmp
    python benchmarks/frontier.py --plot             # table and picture of the rows there are

Calibration: 128 chats about training scans, one set for each of `--seeds`. Measured before any training: KL
to the original in nats per answer token, and exact match, on chats about test scans, with 95% bootstrap
intervals over chats; also apart for chats with one and with several images, and for answers of one token and
longer ones. Converted models read each chat in one pass. Where only the cache is made small (`caches.py`) the
original reads the prompt but for its last token, and this one and the right answer are fed over the small
cache in one chunk, so that all answer tokens are read over it. Appends a row to `--rows` for each method and
size, and writes a table and a picture of all rows to OUT.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caches import EVICTED, LATER, QUANTISED, Over, evicted_cache, read_over
from frontier_pages import BUDGETS, SMALLEST, write_pages
from measured import DOCS, Answer, HeldOut, Rows, encoded, summary

from mha2mla_vlm import ConversionConfig, bytes_per_token, convert, load, load_processor, make_profile
from mha2mla_vlm.config import AttentionSizes
from mha2mla_vlm.conversion.sweep import has_normed_keys
from mha2mla_vlm.data.records import Record
from mha2mla_vlm.model.shipped import ZOO_NAMES
from mha2mla_vlm.zoo.chats import zoo_records

# of the published method, the same in every layer: R and d_kv in sixty-fourths of the head dim
PUBLISHED = {0.5: (32, 32), 0.25: (16, 16), 0.1875: (16, 8), 0.125: (8, 8), 0.09375: (8, 4)}
PUBLISHED |= {0.0625: (4, 4), 0.04: (2, 3)}
BY_CHANNEL_AT_WRITE = "write, bits by channel"
CONVERTED: dict[str, dict[str, Any]] = {
    "published": {"rope_selection": "mkl", "fold": False, "factorization": "md-svd"},
    "write, 16 bits": {"rotate_at": "write", "latent_bits": "16"},
    "read, 16 bits": {"rotate_at": "read", "latent_bits": "16"},
    "auto, bits by channel": {"rotate_at": "auto", "latent_bits": "mixed"},
    "read, bits by channel": {"rotate_at": "read", "latent_bits": "mixed"},
    BY_CHANNEL_AT_WRITE: {"rotate_at": "write", "latent_bits": "mixed"},
    # CARE's factors, of the covariance of inputs, with our ranks of layers
    "activation-svd, read, 16 bits": {
        "rotate_at": "read",
        "latent_bits": "16",
        "factorization": "activation-svd",
    },
}
SAME_PROFILE = {"read, bits by channel": "auto, bits by channel"}
ORIGINAL, CACHED = "original", "caches"
# `convert` holds a fifth of 128 chats out to measure the loss on; this is not needed here, and one is enough
CALIBRATION, HELD_OUT = 128, 26


def setting(method: str, budget: float, head_dim: int) -> ConversionConfig:
    """How to convert: the published sizes are the same in every layer, ours are allocated."""
    how = CONVERTED[method] | {"held_out": 1 / (CALIBRATION - HELD_OUT + 1)}
    if method != "published":
        return ConversionConfig(budget=budget, **how)
    rope_dim, d_kv = (part * head_dim // 64 for part in PUBLISHED[budget])
    return ConversionConfig(qk_rope_head_dim=rope_dim, d_kv=d_kv, **how)


def calibration(name: str, seed: int) -> list[Record]:
    """The chats that `convert` calibrates on when it is given `CALIBRATION`, and one that it holds out."""
    return zoo_records(name, split="train", samples=CALIBRATION, seed=seed)[: CALIBRATION - HELD_OUT + 1]


def figures(images: Sequence[int], chats: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """The summary of all answers, and of parts of them; `images` says how many each chat has."""
    pairs = list(zip(images, chats, strict=True))
    parts = {
        "one image": [chat for count, chat in pairs if count == 1],
        "several images": [chat for count, chat in pairs if count > 1],
        "one token": [[answer for answer in chat if answer.tokens <= 2] for chat in chats],  # and the end
        "longer": [[answer for answer in chat if answer.tokens > 2] for chat in chats],
    }
    return rounded(summary(chats)) | {
        name: rounded(summary(part)) for name, part in parts.items() if any(part)
    }


def rounded(found: dict[str, float]) -> dict[str, float]:
    """To five digits."""
    return {name: float(f"{value:.5g}") for name, value in found.items()}


class Frontier:
    """Rows of one model."""

    def __init__(self, name: str, rows: Rows, samples: int) -> None:
        self.name, self.rows, self.samples = name, rows, samples
        self.model, self.processor = load(f"zoo:{name}", dtype="float32"), load_processor(f"zoo:{name}")
        records = zoo_records(name, split="test", samples=samples, seed=0)
        self.images = [len(record.images) for record in records]
        self.held_out = HeldOut(self.model, encoded(self.model, self.processor, records))
        self.whole = bytes_per_token(self.model.config)
        self.profile: tuple[Any, Any] = (None, None)  # the last one made, and for what

    def has(self, method: str, budget: float | None, seed: int) -> bool:
        """Whether this row is there."""
        return self.rows.has(self.name, method, budget, seed)

    def add(self, method: str, budget: float | None, seed: int, size: float, chats: Any, **more: Any) -> None:
        """Add a row of what answers are worth."""
        key = {"model": self.name, "method": method, "budget": budget, "seed": seed}
        sizes = {
            "samples": self.samples,
            "bytes_per_token": round(size, 1),
            "share": round(size / self.whole, 5),
        }
        self.rows.add(**key, **sizes, **figures(self.images, chats), **more)

    def original(self) -> None:
        """What all are compared with."""
        if not self.has(ORIGINAL, 1.0, 0):
            self.add(ORIGINAL, 1.0, 0, self.whole, self.held_out.answers(self.model))

    def converted(self, method: str, seed: int) -> None:
        """Missing rows of one way to convert; none of bits by channel where cached keys are normed."""
        if method == BY_CHANNEL_AT_WRITE and has_normed_keys(self.model):
            return
        sizes = [budget for budget in BUDGETS if budget >= SMALLEST.get(method, 0.0)]
        missing = [budget for budget in sizes if not self.has(method, budget, seed)]
        records = calibration(self.name, seed) if missing else []
        head_dim = AttentionSizes.of(self.model.config).head_dim
        like = SAME_PROFILE.get(method, method)
        for budget in missing:
            if self.profile[0] != (like, seed):
                made = make_profile(self.model, self.processor, records, setting(like, budget, head_dim))
                self.profile = (like, seed), made
            config = setting(method, budget, head_dim)
            small = convert(self.model, self.processor, records, config, profile=self.profile[1])
            size = bytes_per_token(small.config)
            assert size <= budget * self.whole
            self.add(method, budget, seed, size, self.held_out.answers(small))

    def cached(self) -> None:
        """Missing rows of what makes the original's cache small; no calibration, so no seed."""
        keys = [(method, None) for method in QUANTISED]
        keys += [(name + when, budget) for name in EVICTED for when in ("", LATER) for budget in BUDGETS]
        missing = [key for key in keys if not self.has(*key, 0)]
        if not missing:
            return
        model = load(f"zoo:{self.name}", dtype="float32", attn_implementation="eager")
        kinds = {key: cache_kind(*key) for key in missing}
        read_over(model, self.held_out, list(kinds.values()))
        for (method, budget), over in kinds.items():
            more = {} if over.later else {"first token free": rounded(summary(over.first_free))}
            self.add(method, budget, 0, over.bytes / over.tokens, over.answers, **more)


def cache_kind(method: str, budget: float | None) -> Over:
    """A kind of cache by its name."""
    if budget is None:
        return Over(QUANTISED[method], later=False)
    return Over(evicted_cache(EVICTED[method.removesuffix(LATER)], budget), later=method.endswith(LATER))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out = DOCS / "frontier"
    parser.add_argument("-o", "--output", type=Path, default=out, help="folder of table and picture")
    parser.add_argument("--rows", type=Path, default=out / "rows.jsonl", help="file of rows")
    parser.add_argument("--models", nargs="+", choices=ZOO_NAMES, default=ZOO_NAMES)
    parser.add_argument("--methods", nargs="+", choices=(*CONVERTED, CACHED), default=(*CONVERTED, CACHED))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="of calibration chats")
    parser.add_argument("--samples", type=int, default=200, help="chats to measure on")
    parser.add_argument("--plot", action="store_true", help="measure nothing, write table and picture")
    options = parser.parse_args()
    rows = Rows(options.rows, "model", "method", "budget", "seed")
    for name in () if options.plot else options.models:
        frontier = Frontier(name, rows, options.samples)
        frontier.original()
        for seed in options.seeds:
            for method in CONVERTED:
                if method in options.methods:
                    frontier.converted(method, seed)
        if CACHED in options.methods:
            frontier.cached()
    write_pages(rows.rows, options.output)
    print(json.dumps({"output": str(options.output), "rows": len(rows.rows)}))


if __name__ == "__main__":
    main()
