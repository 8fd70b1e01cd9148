"""A conversation: questions, images and answers, one after the other."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from mha2mla_vlm.data.records import Record
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.evaluation.generation import Answer, answer

IMAGE = "/image "  # begins a line that names an image


class Conversation:
    """The messages so far; images that were shown go with the next question. Errors name `source`."""

    def __init__(self, *, source: str = "record") -> None:
        self.source = source
        self.messages: list[dict[str, Any]] = []
        self.images: list[Image.Image] = []
        self._shown = 0

    def show(self, image: Path | Image.Image) -> None:
        """Show an image; raises `InputError` if it cannot be read."""
        message = {"role": "user", "content": [{"type": "image"}]}
        self.images += Record(messages=[message], images=[image], source="/image").load_images()
        self._shown += 1

    def ask(self, question: str) -> Record:
        """The chat up to the answer that is due; raises `InputError` for an empty question."""
        if not question.strip():
            raise InputError("the question is empty; ask something")
        content: list[dict[str, str]] = [{"type": "image"}] * self._shown
        self.messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        self._shown = 0
        return Record(messages=self.messages, images=self.images, source=self.source)

    def answered(self, text: str) -> None:
        """Add the answer."""
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})


def converse(
    conversation: Conversation,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Iterable[str],
    lines: Iterable[str],
    **options: Any,
) -> Iterator[Answer]:
    """Answer `questions`, then those on `lines`, up to an empty one; `options` are those of `answer`.

    Every answer is to the whole chat, which is read anew.
    """
    for line in _until_empty(questions, lines):
        if line.startswith(IMAGE):
            try:
                conversation.show(Path(line.removeprefix(IMAGE).strip()))
            except InputError as error:
                options["stream"](f"{error}\n")
            continue
        found = answer(model, processor, conversation.ask(line), **options)
        conversation.answered(found.text)
        yield found


def _until_empty(questions: Iterable[str], lines: Iterable[str]) -> Iterator[str]:
    yield from questions
    for line in lines:
        if not line.strip():
            return
        yield line.strip()
