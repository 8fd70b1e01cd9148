"""Images and questions to begin with, for the models that were shipped."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mha2mla_vlm.data.records import message_text
from mha2mla_vlm.model.shipped import ZOO_PREFIX
from mha2mla_vlm.zoo.chats import zoo_records

COUNT = 4


@contextlib.contextmanager
def zoo_examples(config: Any, name: str) -> Iterator[list[tuple[Path, str]]]:
    """Some held-out pages and questions, as files within the context; none for a model that reads no digits.

    `name` is the model's own; a converted one names in `config` which it was made of.
    """
    mla = getattr(config, "mla", None) or {}
    origin = mla.get("original") or name
    if not origin.startswith(ZOO_PREFIX):
        yield []
        return
    records = zoo_records(origin.removeprefix(ZOO_PREFIX), split="test", samples=8 * COUNT, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        found: list[tuple[Path, str]] = []
        for record in (record for record in records if len(record.images) == 1):
            path = Path(folder, f"{len(found)}.png")
            record.load_images()[0].save(path)
            found.append((path, message_text(record.messages[0])))
            if len(found) == COUNT:
                break
        yield found
