"""The default under a budget beside latents in 16 bits and in bits by channel, at the same budgets.

    python benchmarks/budgets.py                     # half an hour on two cores; resumes
    python benchmarks/budgets.py --models llava --samples 50 -o /tmp/rows

Calibration: 128 chats about training scans, a fifth of them held out by `convert`. Measured before any
training: KL to the original and exact match on chats about test scans, with 95% bootstrap intervals over
chats; and beside it what `convert` predicted and what it measured on those that it held out. Appends a row to
`OUT/rows.jsonl` for each conversion, and writes the table of all rows there into `OUT/README.md`.
"""

import json
from typing import Any

from measured import HeldOut, Rows, encoded, write_between, zoo_parser

from mha2mla_vlm import ConversionConfig, bytes_per_token, convert, load, load_processor, make_profile
from mha2mla_vlm.model.shipped import ZOO_NAMES
from mha2mla_vlm.zoo.chats import zoo_records

MARK = "<!-- written by benchmarks/budgets.py -->"
BUDGETS = (0.5, 0.25, 0.125, 0.09375, 0.0625, 0.04)
BITS = ("auto", "16", "mixed")
COLUMNS = (
    "budget",
    "`--latent-bits`",
    "latents",
    "bytes",
    "predicted",
    "KL by `convert`",
    "KL",
    "exact match",
)


def run(name: str, samples: int, rows: Rows) -> None:
    """All rows of one model that are not yet there."""
    missing = [(budget, bits) for budget in BUDGETS for bits in BITS if not rows.has(name, budget, bits)]
    if not missing:
        return
    model, processor = load(f"zoo:{name}", dtype="float32"), load_processor(f"zoo:{name}")
    chats = zoo_records(name, split="train", samples=128, seed=1)
    tested = zoo_records(name, split="test", samples=samples, seed=0)
    held_out = HeldOut(model, encoded(model, processor, tested))
    profile = make_profile(model, processor, chats)
    measured: dict[str, Any] = {}  # what is chosen is often the same
    for budget, bits in missing:
        config = ConversionConfig(budget=budget, latent_bits=bits)
        small = convert(model, processor, chats, config, profile=profile)
        key, low_high = str(small.mla_config), small.findings["kl_interval"]["factorization"]
        if key not in measured:
            measured[key] = held_out.measure(small)
        rows.add(
            model=name,
            budget=budget,
            bits=bits,
            samples=samples,
            chosen="by channel" if small.mla_config.latent_bits else "16 bits",
            bytes_per_token=bytes_per_token(small.config),
            predicted_kl=sum(small.mla_config.predicted_kl or []),
            kl_by_convert=small.mla_config.kl["factorization"],
            **dict(zip(("kl_by_convert_low", "kl_by_convert_high"), low_high, strict=True)),
            **measured[key],
        )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of all rows."""
    lines = []
    for name in ZOO_NAMES:
        own = [row for row in rows if row["model"] == name]
        if not own:
            continue
        lines += [f"### `zoo:{name}`", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        for row in sorted(own, key=lambda row: (-row["budget"], BITS.index(row["bits"]))):
            cells = [f"{row['budget']:.4g}", row["bits"], row["chosen"], f"{row['bytes_per_token']:,}"]
            cells += [f"{row['predicted_kl']:.5f}", interval(row, "kl_by_convert"), interval(row, "kl")]
            match, low, high = (f"{row[f'exact_match{end}']:.1%}" for end in ("", "_low", "_high"))
            lines.append(f"| {' | '.join(cells)} | {match} ({low} to {high}) |")
        lines.append("")
    return "\n".join(lines)


def interval(row: dict[str, Any], name: str) -> str:
    """A figure of a row and its interval."""
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{value:.5f} ({low:.5f} to {high:.5f})"


def main() -> None:
    """Command line."""
    parser = zoo_parser(__doc__, "budgets", samples=200)
    options = parser.parse_args()
    rows = Rows(options.output / "rows.jsonl", "model", "budget", "bits")
    for name in options.models:
        run(name, options.samples, rows)
    page = options.output / "README.md"
    if not page.exists():
        page.write_text(f"{MARK}\n\n<!-- until here -->\n", encoding="utf-8")
    write_between(page, MARK, table(rows.rows))
    print(json.dumps({"output": str(page), "rows": len(rows.rows)}))


if __name__ == "__main__":
    main()
