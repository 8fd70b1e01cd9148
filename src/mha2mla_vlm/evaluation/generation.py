"""One answer from a model, with the bytes of the cache that it took."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    ProcessorMixin,
    TextStreamer,
)

from mha2mla_vlm.data.records import Record, encode
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.cache.latent import cache_bytes
from mha2mla_vlm.utils.compat import cache_of
from mha2mla_vlm.utils.progress import status


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer, and the cache behind it: `cache_bytes` hold `cached_tokens` tokens.

    `allocated_bytes` is the storage of the cache's tensors, with the room they have left to grow.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    cached_tokens: int
    cache_bytes: int
    allocated_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Streamer(TextStreamer):
    """Hands pieces of text to a function as they are finished."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


class Finite(LogitsProcessor):
    """Stops at logits that are not numbers, from which `generate` would pick a token all the same."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if torch.isnan(scores).any():
            raise InputError("the model's logits are not finite: its weights are broken, or overflow")
        return scores


def prompt_record(
    prompt: str, images: Sequence[Path | Image.Image] = (), *, source: str = "record"
) -> Record:
    """A chat of one question about images; errors name `source`."""
    content: list[dict[str, str]] = [{"type": "image"}] * len(images)
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
    return Record(messages=messages, images=images, source=source)


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    record: Record,
    *,
    max_new_tokens: int = 128,
    quantization: dict[str, Any] | None = None,
    stream: Callable[[str], None] | None = None,
) -> Answer:
    """Greedy answer to a chat that ends with a question; `stream` gets the text as it comes.

    `quantization` is a `QuantizationConfig` for the cache, as keyword arguments.
    """
    if quantization and getattr(model.config, "mla", None) is None:
        raise InputError("a quantised cache is for converted models; this one is an original")
    options = {"cache_implementation": "quantized", "cache_config": quantization} if quantization else {}
    inputs = encode(processor, [record], generation_prompt=True).to(model.device)
    with contextlib.ExitStack() as waiting:

        def write(text: str) -> None:
            waiting.close()
            if stream is not None:
                stream(text)

        waiting.enter_context(status("answering"))  # until there is text
        output = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([Finite()]),
            return_dict_in_generate=True,
            **options,
            streamer=_Streamer(processor.tokenizer, write) if stream else None,
        )
    cache, prompt_tokens = cache_of(output), inputs["input_ids"].shape[1]
    new = output.sequences[0, prompt_tokens:]
    return Answer(
        text=processor.tokenizer.decode(new, skip_special_tokens=True).strip(),
        prompt_tokens=prompt_tokens,
        new_tokens=len(new),
        cached_tokens=cache.get_seq_length(),
        cache_bytes=cache_bytes(cache),
        allocated_bytes=cache_bytes(cache, allocated=True),
    )
