"""Keys rotated when they are written and when they are read, at equal bytes: KL and exact match.

    python benchmarks/rotated_at_read.py [MODEL ...] [--samples 200]

Calibrated on 128 chats about training scans, measured on chats about test scans; positions are in the bytes.
"""

import argparse

from mha2mla_vlm import (
    ConversionConfig,
    bytes_per_token,
    convert,
    evaluate,
    load,
    load_processor,
    make_profile,
)
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.shipped import ZOO_NAMES
from mha2mla_vlm.zoo.chats import zoo_records

BUDGETS = (0.5, 0.25, 0.1875, 0.125, 0.09375, 0.0625)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(ZOO_NAMES), metavar="MODEL")
    parser.add_argument("--samples", type=int, default=200, help="chats to measure on")
    given = parser.parse_args()
    print("| | budget | rotated at | bytes per token | KL | exact match | original |")
    print("|---|---|---|---|---|---|---|")
    for name in given.models:
        model, processor = load(f"zoo:{name}", dtype="float32"), load_processor(f"zoo:{name}")
        chats = zoo_records(name, split="train", samples=128, seed=1)
        held_out = zoo_records(name, split="test", samples=given.samples, seed=0)
        for mode in ("write", "read"):
            profile = make_profile(model, processor, chats, ConversionConfig(rotate_at=mode))
            for budget in BUDGETS:
                config = ConversionConfig(rotate_at=mode, budget=budget)
                try:
                    small = convert(model, processor, chats, config, profile=profile)
                except InputError as error:  # less than the least sizes
                    print(f"| `zoo:{name}` | {budget:.4g} | {mode} | {error} | | | |", flush=True)
                    continue
                found = evaluate(small, processor, held_out, baseline=model)
                cells = [f"`zoo:{name}`", f"{budget:.4g}", mode, f"{bytes_per_token(small.config):,}"]
                cells += [f"{found['kl']:.5f}", f"{found['exact_match']:.1%}"]
                print(f"| {' | '.join(cells)} | {found['baseline_exact_match']:.1%} |", flush=True)


if __name__ == "__main__":
    main()
