"""Keys rotated when they are written and when they are read, in 16 bits and in bits by channel, and the
published method, at equal bytes.

    python benchmarks/rotated_at_read.py            # half an hour on two cores; resumes
    python benchmarks/rotated_at_read.py --models llava --samples 50 -o /tmp/rows

Calibration: 128 chats about training scans. Measured before any training: KL to the original and exact match
on chats about test scans, with 95% bootstrap intervals over chats. Bytes hold positions. Appends a row to
`OUT/MODEL.jsonl` for each conversion, and writes the table of all rows there into `OUT/README.md`.
"""

from pathlib import Path
from typing import Any

from ablation import METHODS, PUBLISHED, UNIFORM
from measured import HeldOut, Rows, encoded, write_between, zoo_parser

from mha2mla_vlm import ConversionConfig, bytes_per_token, convert, load, load_processor, make_profile
from mha2mla_vlm.config import AttentionSizes
from mha2mla_vlm.model.shipped import ZOO_NAMES
from mha2mla_vlm.zoo.chats import zoo_records

MARK = "<!-- written by benchmarks/rotated_at_read.py -->"
BUDGETS = (0.5, 0.25, 0.1875, 0.125, 0.09375, 0.0625)
MIXED_BUDGETS = (0.5, 0.25, 0.125, 0.0625, 0.04)
WAYS = ("published", "write", "read", "write mixed", "read mixed")
TITLES = {"published": "write (published)", "write mixed": "write, bits by channel"}
TITLES |= {"read mixed": "read, bits by channel"}
SMALL = {0.125: (8, 8), 0.09375: (8, 16), 0.0625: (16, 16)}  # head dim by R, by d_kv, beyond `UNIFORM`


def settings(way: str, budget: float, head_dim: int) -> ConversionConfig:
    """How to convert: the published sizes are the same in every layer, ours are allocated."""
    if way != "published":
        mode, _, mixed = way.partition(" ")
        return ConversionConfig(rotate_at=mode, budget=budget, latent_bits=mixed or "16")
    by_rope, by_latent = (UNIFORM | SMALL)[budget]
    return ConversionConfig(
        qk_rope_head_dim=head_dim // by_rope, d_kv=head_dim // by_latent, **METHODS[PUBLISHED]
    )


def run(name: str, samples: int, folder: Path) -> None:
    """All rows of one model that are not yet in its file."""
    rows = Rows(folder / f"{name}.jsonl", "way", "budget")
    model, processor = load(f"zoo:{name}", dtype="float32"), load_processor(f"zoo:{name}")
    chats = zoo_records(name, split="train", samples=128, seed=1)
    tested = zoo_records(name, split="test", samples=samples, seed=0)
    held_out = HeldOut(model, encoded(model, processor, tested))

    def add(way: str, budget: float, measured: Any) -> None:
        size = bytes_per_token(measured.config)
        rows.add(way=way, budget=budget, samples=samples, bytes_per_token=size, **held_out.measure(measured))

    if not rows.has("original", 1.0):
        add("original", 1.0, model)
    head_dim = AttentionSizes.of(model.config).head_dim
    for way in WAYS:
        budgets = MIXED_BUDGETS if way.endswith("mixed") else BUDGETS
        missing = [budget for budget in budgets if not rows.has(way, budget)]
        profile = None
        for budget in missing:
            config = settings(way, budget, head_dim)
            profile = profile or make_profile(model, processor, chats, config)
            small = convert(model, processor, chats, config, profile=profile)
            assert bytes_per_token(small.config) <= budget * bytes_per_token(model.config)
            add(way, budget, small)


def table(folder: Path) -> str:
    """Markdown of all rows in a folder."""
    lines = [
        "| | cache | rotated at | bytes per token | KL (95% interval) | exact match (95% interval) |",
        "|---|---|---|---|---|---|",
    ]
    for name in ZOO_NAMES:
        rows = Rows(folder / f"{name}.jsonl", "way", "budget").rows
        order = ("original", *WAYS)
        for row in sorted(rows, key=lambda row: (-row["budget"], order.index(row["way"]))):
            title = TITLES.get(row["way"], row["way"])
            kl = f"{row['kl']:.5f} ({row['kl_low']:.5f} to {row['kl_high']:.5f})"
            match = (
                f"{row['exact_match']:.1%} ({row['exact_match_low']:.1%} to {row['exact_match_high']:.1%})"
            )
            cells = [f"`zoo:{name}`", f"{row['budget']:.4g}", title, f"{row['bytes_per_token']:,}", kl, match]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = zoo_parser(__doc__, "rotated_at_read", samples=200)
    options = parser.parse_args()
    for name in options.models:
        run(name, options.samples, options.output)
    write_between(options.output / "README.md", MARK, table(options.output))


if __name__ == "__main__":
    main()
