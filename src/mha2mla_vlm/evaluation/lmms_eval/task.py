"""A task of lmms-eval out of chats: a folder for its `--include_path`."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from mha2mla_vlm.data.records import Record, message_text, open_image
from mha2mla_vlm.errors import InputError, shown
from mha2mla_vlm.evaluation.answers import DEFAULT_KIND

DOCUMENTS = "documents.jsonl"
HERE = "mha2mla_vlm.evaluation.lmms_eval.task"


class Function(str):
    """The name of a function, which YAML marks as lmms-eval reads it."""


class _Dumper(yaml.SafeDumper):
    """Writes functions by name."""


_Dumper.add_representer(Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def write_task(
    name: str, records: Iterable[Record], folder: Path, *, place: Path, max_new_tokens: int
) -> int:
    """Write a task of every answer in `records`, exact match its measure; returns their number.

    Images are copied. `place` is where the folder will lie. Raises `InputError` for a name that cannot be
    one of a file, and if there is nothing to ask.
    """
    if not name.isidentifier() or len(name) > 100:
        raise InputError(
            f"task name {shown(name)}: give letters, digits and _, not a digit first, 100 at most"
        )
    count = 0
    (folder / "images").mkdir()
    with (folder / DOCUMENTS).open("w", encoding="utf-8") as file:
        for document in _documents(records, folder, place):
            file.write(json.dumps(document) + "\n")
            count += 1
    if not count:
        raise InputError("the records hold no assistant messages; there is nothing to ask")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": DOCUMENTS}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_messages": Function(f"{HERE}.messages"),
        "doc_to_visual": Function(f"{HERE}.images"),
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": max_new_tokens, "do_sample": False},
        "process_results": Function(f"{HERE}.score"),
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": [{"version": 1.0}],
    }
    text = yaml.dump(task, Dumper=_Dumper, sort_keys=False)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return count


def _documents(records: Iterable[Record], folder: Path, place: Path) -> Iterator[dict[str, Any]]:
    """One for each answer: the chat before it, as JSON for its parts have different fields."""
    for number, record in enumerate(records):
        names = [f"images/{number:06d}-{index}.png" for index in range(len(record.images))]
        for name, image in zip(names, record.load_images(), strict=True):
            image.save(folder / name)
        for index in record.answers():
            before = record.before(index)
            yield {
                "messages": json.dumps(before.messages),
                "images": [str(place.resolve() / name) for name in names[: len(before.images)]],
                "question": message_text(before.messages[-1]),
                "answer": message_text(record.messages[index]).strip(),
                "kind": record.messages[index].get("kind", DEFAULT_KIND),
            }


def messages(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The chat of a document, in lmms-eval's form."""
    decoded = iter(images(document))
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "url": next(decoded)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in json.loads(document["messages"])
    ]


def images(document: dict[str, Any]) -> list[Image.Image]:
    """The images of a document, decoded."""
    return [open_image(Path(path), "task") for path in document["images"]]


def score(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer is the one that is wanted."""
    return {"exact_match": float(results[0].strip() == document["answer"])}
