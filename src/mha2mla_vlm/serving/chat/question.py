"""What may be asked: a question of limited length, after others, and an image that can be read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mha2mla_vlm.data.records import Record, open_image
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.serving.chat.conversation import Conversation
from mha2mla_vlm.serving.chat.live import Moment, room_of
from mha2mla_vlm.utils.shown import data_url

MAX_QUESTION = 2_000  # characters
MAX_TURNS = 16  # questions of a conversation
THUMBNAIL = 256  # pixels, on the longer side


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question, the file and the thumbnail of the image that came with it, and each model's answer."""

    question: str
    image: str | None
    thumbnail: str | None
    answers: tuple[Moment, ...]


def question_record(
    path: str | None, question: str | None, earlier: Sequence[Turn] = (), side: int = 0
) -> Record:
    """The chat of a question and, at `path`, its image, after `earlier` turns as the model `side` answered
    them; raises `InputError` for what cannot be asked.
    """
    text = (question or "").strip()
    if not text:
        raise InputError("write a question first")
    if len(text) > MAX_QUESTION:
        raise InputError(f"the question has {len(text):,} characters; ask in at most {MAX_QUESTION:,}")
    if len(earlier) >= MAX_TURNS:
        raise InputError(f"a conversation has at most {MAX_TURNS} questions; begin a new one")
    conversation = Conversation(source="question")
    for turn in earlier:
        _show(conversation, turn.image)
        conversation.ask(turn.question)
        conversation.answered(turn.answers[side].text)
    _show(conversation, path)
    return conversation.ask(text)


def _show(conversation: Conversation, path: str | None) -> None:
    if path is not None:
        conversation.show(open_upload(path))


def open_upload(path: str) -> Image.Image:
    """The image in an uploaded file; raises `InputError`, without the file's place, if there is none."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError("the image is not kept any longer; give it again") from None
    return open_image(data, "upload")


def thumbnail(path: str | None) -> str | None:
    """The image in an uploaded file, small, as a `data:` URL."""
    return None if path is None else data_url(open_upload(path), THUMBNAIL)


def check_answer_length(config: Any, max_new_tokens: int) -> None:
    """Raise `InputError` for answers that are longer than a model's chats can be."""
    room = room_of(config)
    if room is not None and max_new_tokens > room:
        raise InputError(
            f"--max-new-tokens {max_new_tokens}: a chat of this model has room for {room:,} tokens"
        )
