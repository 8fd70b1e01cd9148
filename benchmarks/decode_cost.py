"""Keys rotated at write, at read, and as each layer loses least within a limit of decode arithmetic.

    python benchmarks/decode_cost.py [MODEL ...] [--samples 100] [--budgets 0.125 0.25]

Calibrated on 128 chats about training scans, measured on chats about test scans; positions are in the bytes.
"Arithmetic" is that of attention for each cached token, in that of the original.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from mha2mla_vlm import (
    ConversionConfig,
    bytes_per_token,
    convert,
    evaluate,
    load,
    load_processor,
    make_profile,
)
from mha2mla_vlm.config import AttentionSizes
from mha2mla_vlm.model.shipped import ZOO_NAMES
from mha2mla_vlm.zoo.chats import zoo_records

LIMITS = (2.0, 10.0, 40.0, 1e6)
COLUMNS = ("", "budget", "rotated at", "layers at read", "arithmetic", "bytes per token", "KL", "exact match")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(ZOO_NAMES), metavar="MODEL")
    parser.add_argument("--samples", type=int, default=100, help="chats to measure on")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.125, 0.25])
    given = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |")
    print(f"|{'---|' * len(COLUMNS)}", flush=True)
    for name in given.models:
        for row in rows(name, given.samples, given.budgets):
            print(f"| `zoo:{name}` | {' | '.join(row)} |", flush=True)


def settings(budget: float) -> Iterator[tuple[str, ConversionConfig]]:
    """Every row of one budget: its name and how to convert."""
    for mode in ("write", "read"):
        yield mode, ConversionConfig(rotate_at=mode, budget=budget, latent_bits="16")
    for limit in LIMITS:
        name = f"auto, at most {limit:g}" if limit < LIMITS[-1] else "auto, no limit"
        how: dict[str, Any] = {"rotate_at": "auto", "latent_bits": "16", "max_decode_cost": limit}
        yield name, ConversionConfig(budget=budget, **how)


def rows(name: str, samples: int, budgets: list[float]) -> Iterator[list[str]]:
    """The rows of one model."""
    model, processor = load(f"zoo:{name}", dtype="float32"), load_processor(f"zoo:{name}")
    chats = zoo_records(name, split="train", samples=128, seed=1)
    held_out = zoo_records(name, split="test", samples=samples, seed=0)
    at_write, auto = (ConversionConfig(rotate_at=each, latent_bits="16") for each in ("write", "auto"))
    both = make_profile(model, processor, chats, auto)
    profiles = {"write": make_profile(model, processor, chats, at_write), "read": both, "auto": both}
    measured: dict[str, dict[str, Any]] = {}  # limits that change nothing give the same model
    for budget in budgets:
        for label, config in settings(budget):
            small = convert(model, processor, chats, config, profile=profiles[config.rotate_at])
            mla, sizes = small.mla_config, AttentionSizes.of(model.config)
            if str(mla) not in measured:
                measured[str(mla)] = evaluate(small, processor, held_out, baseline=model)
            found = measured[str(mla)]
            at_read = sum(spec is not None and spec.at_read for spec in mla.layers(sizes))
            cells = [f"{budget:.4g}", label, f"{at_read} of {sizes.layers}", f"{mla.decode_cost(sizes):.2f}"]
            yield [
                *cells,
                f"{bytes_per_token(small.config):,}",
                f"{found['kl']:.5f}",
                f"{found['exact_match']:.1%}",
            ]


if __name__ == "__main__":
    main()
