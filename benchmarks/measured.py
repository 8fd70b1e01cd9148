"""What benchmarks of quality share: held-out chats, intervals, rows that resume, tables in a page."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mha2mla_vlm.data.records import Record, encode_with_labels
from mha2mla_vlm.evaluation.answers import answer_log_probs, answers_right, predicted
from mha2mla_vlm.model.families import get_family

DOCS = Path(__file__).parents[1] / "docs"
DRAWS = 1000  # of the bootstrap
END = "<!-- until here -->"


def encoded(model: Any, processor: Any, records: Sequence[Record]) -> list[Any]:
    """Each chat as a batch of one, labelled where answers are."""
    visual = get_family(model.config.model_type).visual_token_ids(model.config)
    return [encode_with_labels(processor, [record], visual) for record in records]


class HeldOut:
    """Held-out chats, each a batch of one, and what the original answers."""

    def __init__(self, model: Any, batches: list[Any]) -> None:
        self.batches = batches
        self.expected = [answer_log_probs(model, batch) for batch in batches]

    def measure(self, model: Any) -> dict[str, Any]:
        """KL and exact match with 95% bootstrap intervals over chats, and cross-entropy."""
        chats = [self._chat(model, *pair) for pair in zip(self.batches, self.expected, strict=True)]
        kl, tokens, loss, right, answers = (list(column) for column in zip(*chats, strict=True))
        return {
            **with_interval("kl", kl, tokens),
            "cross_entropy": sum(loss) / sum(tokens),
            **with_interval("exact_match", right, answers),
        }

    def _chat(self, model: Any, batch: Any, expected: torch.Tensor) -> tuple[float, int, float, int, int]:
        found = answer_log_probs(model, batch)
        targets = batch["labels"][:, 1:][predicted(batch)]
        marks = answers_right(found.argmax(-1), batch)
        kl = nn.functional.kl_div(found, expected, reduction="sum", log_target=True)
        loss = nn.functional.nll_loss(found, targets, reduction="sum")
        return float(kl), len(targets), float(loss), sum(marks), len(marks)


def with_interval(name: str, sums: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    """The mean of chats' `sums` over their `counts`, and its 95% bootstrap interval over chats."""
    rng, draws = random.Random(0), []
    for _ in range(DRAWS):
        rows = rng.choices(range(len(sums)), k=len(sums))
        draws.append(sum(sums[i] for i in rows) / sum(counts[i] for i in rows))
    draws.sort()
    low, high = draws[DRAWS // 40], draws[DRAWS - DRAWS // 40 - 1]
    return {name: sum(sums) / sum(counts), f"{name}_low": low, f"{name}_high": high}


class Rows:
    """Rows of one file of JSON lines; a benchmark that starts again makes only those that are not there."""

    def __init__(self, path: Path, *keys: str) -> None:
        self.path, self.keys = path, keys
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def has(self, *values: Any) -> bool:
        """Whether there is a row with these values of the keys."""
        return any(tuple(row[key] for key in self.keys) == values for row in self.rows)

    def add(self, **row: Any) -> None:
        """Append a row, and print it."""
        self.rows.append(row)
        text = json.dumps(row)
        with self.path.open("a") as file:
            file.write(text + "\n")
        print(text, flush=True)


def write_between(page: Path, mark: str, text: str) -> None:
    """Put a text between `mark` and the next `END` of a page."""
    before, rest = page.read_text(encoding="utf-8").split(mark)
    page.write_text(f"{before}{mark}\n\n{text}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")
