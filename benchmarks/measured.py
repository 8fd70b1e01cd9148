"""What benchmarks of quality share: held-out chats, intervals, rows that resume, tables in a page."""

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mha2mla_vlm.data.records import Record, encode_with_labels
from mha2mla_vlm.evaluation.answers import answer_log_probs, kl_sum, predicted
from mha2mla_vlm.evaluation.intervals import bootstrap_interval
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.shipped import ZOO_NAMES

DOCS = Path(__file__).parents[1] / "docs"
END = "<!-- until here -->"


def zoo_parser(text: str | None, folder: str, *, samples: int) -> argparse.ArgumentParser:
    """The options of a benchmark of the shipped models: a folder, by default of docs/, models, chats."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=DOCS / folder, help="folder of rows and page")
    parser.add_argument("--models", nargs="+", choices=ZOO_NAMES, default=ZOO_NAMES)
    parser.add_argument("--samples", type=int, default=samples, help="held-out chats, of each kind")
    return parser


def encoded(model: Any, processor: Any, records: Sequence[Record]) -> list[Any]:
    """Each chat as a batch of one, labelled where answers are."""
    visual = get_family(model.config.model_type).visual_token_ids(model.config)
    return [encode_with_labels(processor, [record], visual) for record in records]


class Answer(NamedTuple):
    """One answer of a model: KL to the original's and cross-entropy, summed over its tokens (nats)."""

    kl: float
    loss: float
    tokens: int
    right: bool


def scored(found: torch.Tensor, expected: torch.Tensor, targets: torch.Tensor) -> Answer:
    """What log probabilities `found [A, V]` of an answer's tokens `targets [A]` are worth beside those that
    are `expected`. It is right if each token is the likeliest, for greedy decoding then gives it.
    """
    return Answer(
        kl=kl_sum(found, expected),
        loss=float(nn.functional.nll_loss(found, targets, reduction="sum")),
        tokens=len(targets),
        right=bool((found.argmax(-1) == targets).all()),
    )


def by_answer(values: torch.Tensor, batch: Any) -> tuple[torch.Tensor, ...]:
    """`values [A, ...]` of the answer tokens of one chat, apart for each answer."""
    places = predicted(batch)[0].nonzero()[:, 0]
    return values.tensor_split((places.diff() > 1).nonzero()[:, 0] + 1)


def summary(chats: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """KL and exact match with 95% bootstrap intervals over chats, and cross-entropy."""
    columns = [tuple(map(sum, zip(*chat, strict=True))) for chat in chats if chat]
    kl, loss, tokens, right = (list(column) for column in zip(*columns, strict=True))
    return {
        **with_interval("kl", kl, tokens),
        "cross_entropy": sum(loss) / sum(tokens),
        **with_interval("exact_match", right, [len(chat) for chat in chats if chat]),
    }


class SeenTower(nn.Module):
    """A vision tower that keeps what it made of each image, for conversion leaves it as it is."""

    def __init__(self, tower: nn.Module, known: dict[bytes, Any]) -> None:
        super().__init__()
        self.tower, self.known = tower, known

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "tower" else getattr(self.tower, name)

    def forward(self, pixels: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the tower makes of these pixels."""
        key = hashlib.sha256(repr(pixels.shape).encode() + pixels.numpy().tobytes()).digest()
        if key not in self.known:
            self.known[key] = self.tower(pixels, *args, **kwargs)
        return copy(self.known[key])  # callers write into it


@contextmanager
def seeing_once(model: Any, known: dict[bytes, Any]) -> Iterator[None]:
    """The model with a `SeenTower`, which keeps what it makes in `known`."""
    inner = model.model
    name = next(name for name in ("visual", "vision_tower") if hasattr(inner, name))
    tower = getattr(inner, name)
    setattr(inner, name, SeenTower(tower, known))
    try:
        yield
    finally:
        setattr(inner, name, tower)


class HeldOut:
    """Held-out chats, each a batch of one, and what the original answers."""

    def __init__(self, model: Any, batches: list[Any]) -> None:
        self.batches, self.seen = batches, dict[bytes, Any]()
        with seeing_once(model, self.seen):
            self.expected = [answer_log_probs(model, batch) for batch in batches]
        self.targets = [batch["labels"][:, 1:][predicted(batch)] for batch in batches]

    def measure(self, model: Any) -> dict[str, Any]:
        """The `summary` of a model's answers."""
        return summary(self.answers(model))

    def answers(self, model: Any) -> list[list[Answer]]:
        """The answers of each chat, in one pass over it."""
        with seeing_once(model, self.seen):
            found = [answer_log_probs(model, batch) for batch in self.batches]
        return [[scored(*each) for each in zip(*parts, strict=True)] for parts in self.parts(found)]

    def parts(self, *more: Iterable[torch.Tensor]) -> Iterator[list[tuple[torch.Tensor, ...]]]:
        """Of each chat the tensors in `more`, the expected log probabilities and targets, cut by answer."""
        for batch, *values in zip(self.batches, *more, self.expected, self.targets, strict=True):
            yield [by_answer(each, batch) for each in values]


def with_interval(name: str, sums: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    """The mean of chats' `sums` over their `counts`, and its 95% bootstrap interval over chats."""
    low, high = bootstrap_interval(sums, counts)
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
    """Put a text between `mark` and the next `END` of a page, which is made if it is not there."""
    known = page.read_text(encoding="utf-8") if page.exists() else f"{mark}\n\n{END}\n"
    before, rest = known.split(mark)
    page.write_text(f"{before}{mark}\n\n{text}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")
