"""The whole way on a shipped model: convert, evaluate against the original, measure the cache."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from transformers import PreTrainedModel, ProcessorMixin

from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.pipeline import convert
from mha2mla_vlm.data.records import Record
from mha2mla_vlm.errors import need
from mha2mla_vlm.evaluation.answers import Answered, by_kind, evaluate_answers, summary
from mha2mla_vlm.evaluation.generation import answer
from mha2mla_vlm.model.cache.latent import bytes_per_token
from mha2mla_vlm.model.checkpoint import load, load_processor, pick_device
from mha2mla_vlm.model.shipped import check_name
from mha2mla_vlm.report.gather import Report, gather
from mha2mla_vlm.report.page import write_report
from mha2mla_vlm.utils.folders import check_file, claimed, new_folder
from mha2mla_vlm.zoo.chats import zoo_records

CALIBRATION_CHATS = 128
# when keys are rotated, bits of latent channels, share of the cache
SIZES = (("write", "16", 0.25), ("read", "16", 0.125), ("read", "mixed", 0.0625))
CACHED = torch.bfloat16  # as models are served; quality is measured in float32
PAGE = "mha2mla-demo-{}.html"  # in the working folder, if none is given


def run_demo(
    name: str, *, samples: int = 100, output: Path | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Convert a zoo model to each of SIZES and compare; returns the rows of the table.

    A page about the smallest is written to `output`, or to the working folder.

    `exact_match` counts answers of held-out chats, `kl` is the mean divergence from the
    original on their tokens, both in float32, `cache_bytes` the tensors of a real cache after one answer in
    bfloat16.
    """
    name = check_name(name)
    need("matplotlib", "report", "the page of the demo")
    if output is None:
        page = Path(PAGE.format(name))
        with claimed(page, check_file):
            result, found = _compared(name, samples, device)
            write_report(found, page)
        return {**result, "report": str(page)}
    with new_folder(output) as folder:
        result, found = _compared(name, samples, device)
        (folder / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        write_report(found, folder / "report.html")
    return {**result, "report": str(output / "report.html")}


def _compared(name: str, samples: int, device: str) -> tuple[dict[str, Any], Report]:
    """The rows of the table, and the report of the smallest model."""
    model = load(f"zoo:{name}", dtype=torch.float32).to(pick_device(device))
    processor = load_processor(f"zoo:{name}")
    calibration = zoo_records(name, split="train", samples=CALIBRATION_CHATS, seed=1)
    held_out = zoo_records(name, split="test", samples=samples, seed=0)
    converted = {}
    for mode, bits, budget in SIZES:
        config = ConversionConfig(rotate_at=mode, latent_bits=bits, budget=budget)
        title = f"{100 * budget:g}% {mode}{', mixed' if config.bits_by_channel else ''}"
        converted[title] = convert(model, processor, calibration, config)
    rows = [_row("original", model, processor, held_out, evaluate_answers(model, processor, held_out))]
    for title, small in converted.items():
        answers = evaluate_answers(small, processor, held_out, baseline=model)
        rows.append(_row(title, small, processor, held_out, answers))
    result = {"model": name, "samples": samples, "rows": rows}
    given: dict[str, Any] = {
        "name": f"zoo:{name}, {SIZES[-1][2]:.1%} of its cache",
        "findings": small.findings,
    }
    given["commands"] = [f"mha2mla demo --model {name} --samples {samples}"]
    return result, gather(
        small, model, processor, held_out, **given, answers=answers, itemsize=CACHED.itemsize
    )


def _row(
    title: str,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    held_out: list[Record],
    answers: list[Answered],
) -> dict[str, Any]:
    measured = summary(answers)
    question = max((r.before(i) for r in held_out for i in r.answers()), key=lambda r: len(r.messages))
    once = answer(copy.deepcopy(model).to(CACHED), processor, question, max_new_tokens=32)
    return {
        "name": title,
        "bytes_per_token": bytes_per_token(model.config, itemsize=CACHED.itemsize),
        "answer": once.text,
        "cache_bytes": once.cache_bytes,
        "allocated_bytes": once.allocated_bytes,
        "cached_tokens": once.cached_tokens,
        "exact_match": measured["exact_match"],
        "kl": measured.get("kl", 0.0),
        "by_kind": {kind: row["exact_match"] for kind, row in by_kind(answers).items()},
    }


def demo_table(result: dict[str, Any]) -> RenderableType:
    """The table of a demo, with an answer of each model."""
    first = result["rows"][0]
    table = Table(title=f"zoo:{result['model']}, {result['samples']} held-out chats, before any training")
    for column in ("", "bytes/token", "one cache", "share", "exact match", "KL"):
        table.add_column(column, no_wrap=True, justify="left" if not column else "right")
    for row in result["rows"]:
        ratio = (row["cache_bytes"] / row["cached_tokens"]) / (first["cache_bytes"] / first["cached_tokens"])
        table.add_row(
            row["name"],
            f"{row['bytes_per_token']:,}",
            f"{row['cache_bytes']:,} B",
            f"{ratio:.1%}",
            f"{row['exact_match']:.1%}",
            f"{row['kl']:.4f}",
        )
    answers = [
        f"{row['name']}: after {row['cached_tokens']} tokens it answers {row['answer']!r}"
        for row in result["rows"]
    ]
    return Group(table, *answers, f"the page about the smallest: {result['report']}")
