"""Chat records, checked, and turned into model inputs with answer-only labels."""

import io
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, overload

import torch
from jinja2 import TemplateError
from PIL import Image, UnidentifiedImageError
from transformers import BatchFeature, ProcessorMixin

from mha2mla_vlm.errors import InputError, first_line, shown, shown_path
from mha2mla_vlm.utils.compat import image_token_counts, with_image_text

IGNORE_INDEX = -100  # label of a token that is not part of an answer
ROLES = ("system", "user", "assistant")
PARTS = ("text", "image")
ImageSource = Path | bytes | Image.Image  # a file, its content, or a decoded image
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # no others: reading EPS runs Ghostscript
MAX_PIXELS = 89_478_485  # of an image, where Pillow begins to warn: a small file can be gigabytes of pixels


@dataclass(frozen=True, kw_only=True)
class Record:
    """One chat. `messages` follow transformers' convention; `images` are in order.

    An assistant message may carry a `kind`, by which `evaluate` reports it.
    """

    messages: list[dict[str, Any]]
    images: Sequence[ImageSource] = field(default_factory=tuple)
    source: str = "record"

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", _checked_messages(self.messages, self.source))
        wanted = sum(part["type"] == "image" for message in self.messages for part in message["content"])
        if wanted != len(self.images):
            raise InputError(
                f"{self.source}: {len(self.images)} image(s) for {wanted} image placeholder(s); "
                "give one image for each"
            )

    def load_images(self) -> list[Image.Image]:
        """The images, decoded to RGB; raises `InputError` naming a file that is missing or broken."""
        return [open_image(image, self.source) for image in self.images]

    def answers(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    def before(self, index: int) -> "Record":
        """The chat up to, without, message `index`: what the model saw when it was asked for it."""
        messages = self.messages[:index]
        shown = sum(part["type"] == "image" for message in messages for part in message["content"])
        return Record(messages=messages, images=self.images[:shown], source=self.source)


def message_text(message: dict[str, Any]) -> str:
    """The text of a message, without placeholders."""
    return "".join(part.get("text", "") for part in message["content"] if part["type"] == "text")


def _checked_messages(messages: Any, source: str) -> list[dict[str, Any]]:
    """Messages with their content as a list of parts; raises `InputError` for what is not a chat."""
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{source}: no messages; give a list of role and content")
    checked: list[dict[str, Any]] = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise InputError(f"{source}: unknown role {shown(role)}; known: {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
            raise InputError(f"{source}: content must be a string or a list of typed parts")
        for part in content:
            if part.get("type") not in PARTS or (
                part["type"] == "text" and not isinstance(part.get("text"), str)
            ):
                raise InputError(
                    f"{source}: cannot use content {shown(part)}; known types: {', '.join(PARTS)}"
                )
        if role == "assistant" and all(earlier["role"] == "system" for earlier in checked):
            raise InputError(f"{source}: the chat begins with an answer; give the question before it")
        if not isinstance(message.get("kind", ""), str):
            raise InputError(f"{source}: `kind` must be text, not {shown(message['kind'])}")
        texts = [part["text"] for part in content if part["type"] == "text"]
        try:
            "".join([*texts, message.get("kind", "")]).encode()
        except UnicodeEncodeError:
            raise InputError(f"{source}: half a surrogate pair in the text; give whole characters") from None
        checked.append({**message, "content": content})
    return checked


def open_image(image: ImageSource, source: str) -> Image.Image:
    """An image in RGB; raises `InputError` if it is missing, broken, too large or of no known format."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    name = f"of {len(image)} bytes" if isinstance(image, bytes) else shown_path(image)
    try:
        if isinstance(image, Path) and image.exists() and not image.is_file():
            raise InputError(f"{source}: image {name} is not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it is an error here
            file = io.BytesIO(image) if isinstance(image, bytes) else image
            opened = Image.open(file, formats=IMAGE_FORMATS)
        with opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise InputError(
                    f"{source}: image {name} has {opened.width} x {opened.height} pixels; give at most "
                    f"{MAX_PIXELS:,}"
                )
            return opened.convert("RGB")
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{source}: image {name} does not exist") from None
    except UnidentifiedImageError:
        raise InputError(
            f"{source}: image {name} cannot be read: it is none of {', '.join(IMAGE_FORMATS)}"
        ) from None
    except Exception as error:  # each decoder has its own
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{source}: image {name} cannot be read: {reason}") from error


def encode(
    processor: ProcessorMixin, records: Sequence[Record], *, generation_prompt: bool = False
) -> BatchFeature:
    """A padded batch of whole chats, by the processor's own chat template.

    With `generation_prompt` each chat ends where the assistant's next answer begins.
    """
    images = [record.load_images() for record in records]
    try:
        texts = [_render(processor, record.messages, prompt=generation_prompt) for record in records]
        return _process(processor, texts, images)
    except (ValueError, TypeError, TemplateError) as error:  # no template, or a placeholder within a text
        raise InputError(
            f"{records[0].source}: the processor refuses the chat: {first_line(error)}"
        ) from error


def _render(
    processor: ProcessorMixin, messages: list[dict[str, Any]], *, prompt: bool = False, written: bool = False
) -> str:
    """A chat's text; `written` with what the processor writes in an image's place (`with_image_text`)."""
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return with_image_text(processor, text) if written else text


def _special(processor: ProcessorMixin, text: str) -> dict[str, bool]:
    """Let the tokenizer add its first token unless the template has written it."""
    first = processor.tokenizer.bos_token
    return {"add_special_tokens": first is None or not text.startswith(first)}


def _process(processor: ProcessorMixin, texts: list[str], images: list[list[Image.Image]]) -> BatchFeature:
    kwargs: dict[str, Any] = _special(processor, texts[0])
    if any(images):
        # a chat without images is an empty list to processors that keep images apart by chat, else left out
        own = set(processor.image_processor.model_input_names)
        by_chat = own & {"pixel_attention_mask", "num_crops", "image_position_ids"}  # the last two: Gemma's
        kwargs["images"] = images if by_chat else [chat for chat in images if chat]
    return processor(text=texts, **kwargs, padding=True, return_tensors="pt")


def encode_with_labels(
    processor: ProcessorMixin, records: Sequence[Record], visual_token_ids: Sequence[int]
) -> BatchFeature:
    """`encode` plus `labels [B, T]`: the ids of the answers and of the token that ends each, else
    `IGNORE_INDEX`.

    The answers are found by rendering each chat up to and through every answer, in the text before the
    processor puts many placeholders, and marks between them, where one was; the tokens between placeholders
    are then found again (`_places`).
    """
    batch = encode(processor, records)
    visual = set(visual_token_ids)
    labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
    for row, record in enumerate(records):
        ids, is_answer = _answer_tokens(processor, record)
        real = batch["attention_mask"][row].bool().nonzero()[:, 0]
        places = _places([None if i in visual else i for i in ids], batch["input_ids"][row, real].tolist())
        if places is None:
            raise InputError(f"{record.source}: the processor changed the text of the chat; cannot label it")
        answers = [
            p for p, wanted in zip(places, is_answer.tolist(), strict=True) if wanted and p is not None
        ]
        kept = real[answers]
        labels[row, kept] = batch["input_ids"][row, kept]
    batch["labels"] = labels
    return batch


def _places(pattern: list[int | None], ids: list[int]) -> list[int | None] | None:
    """Where in `ids` each token of `pattern` is, if what stands there for one or more None may be any tokens,
    at least one; None where they are not alike. The text before the first None is at the begin, that behind
    the last at the end, and each between two as early as it can be.
    """
    places, at = list[int | None](), 0
    for is_text, group in itertools.groupby(pattern, lambda token: token is not None):
        tokens = list(group)
        if not is_text:
            places, at = places + [None] * len(tokens), at + 1  # one token at least
            continue
        last = len(places) + len(tokens) == len(pattern)
        begins = [len(ids) - len(tokens)] if last else range(at, len(ids)) if places else [0]
        begin = next((b for b in begins if at <= b and ids[b : b + len(tokens)] == tokens), None)
        if begin is None:
            return None
        at = begin + len(tokens)
        places += range(begin, at)
    return places if at <= len(ids) and (pattern[-1:] == [None] or at == len(ids)) else None


class EncodedRecords(Sequence[BatchFeature]):
    """Chats as batches of one row (`encode_with_labels`), made when one is asked for: pixels are many."""

    def __init__(
        self, processor: ProcessorMixin, records: Sequence[Record], visual_token_ids: Sequence[int]
    ) -> None:
        self.processor, self.records, self.visual_token_ids = processor, records, visual_token_ids

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> BatchFeature: ...

    @overload
    def __getitem__(self, index: slice) -> Self: ...

    def __getitem__(self, index: int | slice) -> BatchFeature | Self:
        if isinstance(index, slice):
            return type(self)(self.processor, self.records[index], self.visual_token_ids)
        return encode_with_labels(self.processor, [self.records[index]], self.visual_token_ids)


def _answer_tokens(processor: ProcessorMixin, record: Record) -> tuple[list[int], torch.Tensor]:
    """Ids of a chat before placeholders are repeated, and which of them lie within an answer.

    A line break that a template writes behind the token that ends an answer is no part of it.
    """
    text = _render(processor, record.messages, written=True)
    encoded = processor.tokenizer(text, return_offsets_mapping=True, **_special(processor, text))
    offsets = torch.tensor(encoded["offset_mapping"])
    special = torch.tensor(processor.tokenizer.all_special_ids)
    is_special = torch.isin(torch.tensor(encoded["input_ids"]), special)
    is_answer = torch.zeros(len(offsets), dtype=torch.bool)
    for index in record.answers():
        start = _render(processor, record.messages[:index], prompt=True, written=True)
        through = _render(processor, record.messages[: index + 1], written=True)
        if not text.startswith(start) or not text.startswith(through):
            raise InputError(
                f"{record.source}: the chat template rewrites earlier turns; cannot label answers"
            )
        inside = (offsets[:, 0] >= len(start)) & (offsets[:, 1] <= len(through))
        ends = (inside & is_special).nonzero()[:, 0]
        if len(ends):
            inside[ends[-1] + 1 :] = False
        is_answer |= inside
    return encoded["input_ids"], is_answer


def chat_length(processor: ProcessorMixin, record: Record) -> int:
    """Tokens of a whole chat, without preparing its pixels where the processor can tell; raises `InputError`
    if it cannot be read.
    """
    images = record.load_images()
    try:
        text = _render(processor, record.messages)
    except TemplateError as error:
        raise InputError(f"{record.source}: the processor refuses the chat: {error}") from error
    found = text.count(processor.image_token)
    if found != len(images):
        raise InputError(
            f"{record.source}: {found} times {processor.image_token} in the text for {len(images)} image(s); "
            "leave it out, an image's place is a part of type image"
        )
    text = with_image_text(processor, text)
    plain = len(processor.tokenizer(text, **_special(processor, text))["input_ids"])
    if not images:
        return plain
    sizes = [(image.height, image.width) for image in images]
    try:
        visual = image_token_counts(processor, sizes)
    except ValueError as error:  # of a shape that it does not take
        raise InputError(f"{record.source}: the processor refuses an image: {error}") from error
    if visual is None:
        return encode(processor, [record])["input_ids"].shape[1]
    return plain + sum(visual) - len(images)
