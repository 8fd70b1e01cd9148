"""Images and questions to begin with: the user's, or of the models that were shipped."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mha2mla_vlm.data.records import Record, message_text
from mha2mla_vlm.data.sources import load_records
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.shipped import ZOO_PREFIX
from mha2mla_vlm.zoo.chats import zoo_records

COUNT = 4
SEARCHED = 8 * COUNT  # chats


def example_questions(config: Any, name: str, data: str | None) -> list[tuple[Image.Image, str]]:
    """First questions of chats about one image: in `data`, else of held-out ones of a shipped model.

    `name` is the model's own; a converted one names in `config` which it was made of. Raises `InputError`
    for `data` without such a question.
    """
    origin = (getattr(config, "mla", None) or {}).get("original") or name
    if data is not None:
        records: Sequence[Record] = load_records(data, limit=SEARCHED)
    elif origin.startswith(ZOO_PREFIX):
        records = zoo_records(origin.removeprefix(ZOO_PREFIX), split="test", samples=SEARCHED, seed=0)
    else:
        return []
    chats = [record for record in records if record.answers() and len(record.images) == 1]
    first = [record.before(record.answers()[0]) for record in chats]
    asked = [(record, message_text(record.messages[-1]).strip()) for record in first]
    found = [(record, text) for record, text in asked if text and record.images][:COUNT]
    if not found:
        which = f"none of the first {SEARCHED} chats is about one image and begins with a question about it"
        raise InputError(f"--data {data}: {which}; leave it out, or give others")
    return [(record.load_images()[0], text) for record, text in found]


@contextlib.contextmanager
def example_files(questions: Sequence[tuple[Image.Image, str]]) -> Iterator[list[tuple[Path, str]]]:
    """The same with the images as files, within the context."""
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for number, (image, text) in enumerate(questions):
            path = Path(folder, f"{number}.png")
            image.save(path)
            found.append((path, text))
        yield found
