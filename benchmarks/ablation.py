"""Training-free conversion, ingredient by ingredient, on the zoo models at equal cache bytes.

    python benchmarks/ablation.py                      # all models and budgets, an hour on two cores; resumes
    python benchmarks/ablation.py --models llava --budgets 0.25 -o /tmp/rows

Calibration: 128 chats about training scans. Measured: held-out chats about test scans. Appends a row to
`OUT/MODEL.jsonl` for each conversion and writes the tables of all rows there into `OUT/ablation.md`.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measured import HeldOut, encoded, write_between, zoo_parser

from mha2mla_vlm import ConversionConfig, convert, load, load_processor
from mha2mla_vlm.config import AttentionSizes
from mha2mla_vlm.conversion.pipeline import make_profile
from mha2mla_vlm.model.cache.latent import bytes_per_token
from mha2mla_vlm.model.shipped import ZOO_NAMES
from mha2mla_vlm.zoo.chats import zoo_records

MARK = "<!-- written by benchmarks/ablation.py -->"
BUDGETS = (0.5, 0.375, 0.25, 0.1875)
UNIFORM = {0.5: (2, 2), 0.375: (2, 4), 0.25: (4, 4), 0.1875: (4, 8)}  # head dim by R, by d_kv
QUARTER_ROPE = {0.5: 0.75, 0.375: 0.5}  # d_kv as a share of the head dim, at the paper's R = D/4


def method(selection: str, fold: bool, factorization: str) -> dict[str, Any]:
    """How to convert, whatever the sizes."""
    return {"rotate_at": "write", "rope_selection": selection, "fold": fold, "factorization": factorization}


METHODS = {
    "published (mkl, md-svd)": method("mkl", False, "md-svd"),
    **{name: method(name, False, "md-svd") for name in ("high", "low", "uniform", "2-norm")},
    "mkl, SVD of the weights": method("mkl", False, "weight-svd"),
    "rotation-kl": method("rotation-kl", False, "md-svd"),
    "rotation-kl + fold": method("rotation-kl", True, "md-svd"),
    "residual + fold": method("residual", True, "md-svd"),
    "… + centered": method("residual", True, "centered"),
    "… + output-weighted": method("residual", True, "output-weighted"),
    "… + both": method("residual", True, "output-weighted-centered"),
}
PUBLISHED, OURS = "published (mkl, md-svd)", "ours: … + output-weighted, allocated over layers"
ALLOCATED = {"published, allocated over layers": PUBLISHED, OURS: "… + output-weighted"}


def settings(budget: float, head_dim: int) -> Iterator[tuple[str, ConversionConfig]]:
    """Every row of one budget: its name and how to convert."""
    by_rope, by_latent = UNIFORM[budget]
    sizes: dict[str, Any] = {"qk_rope_head_dim": head_dim // by_rope, "d_kv": head_dim // by_latent}
    for name, how in METHODS.items():
        yield name, ConversionConfig(**sizes, **how)
        if name == PUBLISHED and budget in QUARTER_ROPE:
            quarter: dict[str, Any] = {
                "qk_rope_head_dim": head_dim // 4,
                "d_kv": int(QUARTER_ROPE[budget] * head_dim),
            }
            yield f"{name}, R = D/4", ConversionConfig(**quarter, **how)
    for name, like in ALLOCATED.items():
        yield name, ConversionConfig(budget=budget, latent_bits="16", **METHODS[like])


def run(name: str, budgets: list[float], samples: int, folder: Path) -> None:
    """All rows of one model that are not yet in its file."""
    path = folder / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["budget"], row["method"]) for row in rows}
    model, processor = load(f"zoo:{name}", dtype=torch.float32), load_processor(f"zoo:{name}")
    chats = zoo_records(name, split="test", samples=samples, seed=0)
    held_out = HeldOut(model, encoded(model, processor, chats))
    records = zoo_records(name, split="train", samples=128, seed=1)
    whole = bytes_per_token(model.config)
    head_dim = AttentionSizes.of(model.config).head_dim

    def add(budget: float, method: str, converted: Any, **more: Any) -> None:
        row = {"budget": budget, "method": method, "samples": samples, **more}
        row |= {"bytes_per_token": bytes_per_token(converted.config), **held_out.measure(converted)}
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    if (1.0, "original") not in done:
        add(1.0, "original", model)
    profiles: dict[ConversionConfig, Any] = {}
    for budget in budgets:
        for method, config in settings(budget, head_dim):
            if (budget, method) in done:
                continue
            key = replace(config, budget=None, qk_rope_head_dim=None, d_kv=None)
            if key not in profiles:
                profiles[key] = make_profile(model, processor, records, key)
            small = convert(model, processor, records, config, profile=profiles[key])
            mla = small.mla_config
            assert bytes_per_token(small.config) <= budget * whole
            add(budget, method, small, rope=mla.qk_rope_head_dim, rank=mla.kv_lora_rank)


def table(folder: Path) -> str:
    """Markdown tables of all rows in a folder."""
    order = ["original", *dict.fromkeys(name for b in BUDGETS for name, _ in settings(b, 64))]
    text = []
    for name in ZOO_NAMES:
        path = folder / f"{name}.jsonl"
        if not path.exists():
            continue
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows.sort(key=lambda row: (-row["budget"], order.index(row["method"])))
        text += [
            f"## `zoo:{name}`",
            "",
            "| cache | method | bytes/token | KL (95% interval) | cross-entropy | exact match |",
        ]
        text += ["|---|---|---|---|---|---|"]
        for row in rows:
            interval = f"{row['kl']:.4f} ({row['kl_low']:.4f} to {row['kl_high']:.4f})"
            cells = [f"{row['budget']:.4g}", row["method"], f"{row['bytes_per_token']:,}", interval]
            text.append(
                "| " + " | ".join([*cells, f"{row['cross_entropy']:.3f}", f"{row['exact_match']:.1%}"]) + " |"
            )
        text.append("")
    return "\n".join(text)


def main() -> None:
    """Command line."""
    parser = zoo_parser(__doc__, "ablation", samples=200)
    parser.add_argument("--budgets", nargs="+", type=float, choices=BUDGETS, default=BUDGETS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        run(name, list(options.budgets), options.samples, options.output)
    write_between(options.output / "ablation.md", MARK, table(options.output))
    print(json.dumps({"output": str(options.output), "models": list(options.models)}))


if __name__ == "__main__":
    main()
