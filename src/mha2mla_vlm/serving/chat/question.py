"""What may be asked: a question of limited length, and an image that can be read."""

from pathlib import Path
from typing import Any

from PIL import Image

from mha2mla_vlm.data.records import Record, open_image
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.evaluation.generation import prompt_record

MAX_QUESTION = 2_000  # characters


def question_record(path: str | None, question: str | None) -> Record:
    """The chat of a question and, at `path`, its image; raises `InputError` for what cannot be asked."""
    text = (question or "").strip()
    if not text:
        raise InputError("write a question first")
    if len(text) > MAX_QUESTION:
        raise InputError(f"the question has {len(text):,} characters; ask in at most {MAX_QUESTION:,}")
    return prompt_record(text, [] if path is None else [open_upload(path)], source="question")


def open_upload(path: str) -> Image.Image:
    """The image in an uploaded file; raises `InputError`, without the file's place, if there is none."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError("the image is not kept any longer; give it again") from None
    return open_image(data, "upload")


def check_answer_length(config: Any, max_new_tokens: int) -> None:
    """Raise `InputError` for answers that are longer than a model's chats can be."""
    room = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if room is not None and max_new_tokens > room:
        raise InputError(
            f"--max-new-tokens {max_new_tokens}: a chat of this model has room for {room:,} tokens"
        )
