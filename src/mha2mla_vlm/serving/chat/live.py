"""An answer as it comes, with the bytes of the cache behind it."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from mha2mla_vlm.data.records import Record, encode
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.evaluation.generation import Finite
from mha2mla_vlm.model.cache.latent import LatentCache, cache_bytes
from mha2mla_vlm.utils.compat import cache_argument

TIMED = 8  # tokens; a speed of fewer is that of a moment


@dataclass(frozen=True, kw_only=True)
class Moment:
    """An answer so far: its text, its tokens, the cache of the whole chat, and the seconds since the first
    token, which the prompt's are not part of.
    """

    text: str
    new_tokens: int
    cached_tokens: int
    cache_bytes: int
    seconds: float

    @property
    def rate(self) -> float | None:
        """Tokens a second after the first, None while there are too few to say."""
        return (self.new_tokens - 1) / self.seconds if self.new_tokens >= TIMED and self.seconds > 0 else None


class _Watch(TextStreamer):
    """Reports every token; text comes when it is whole."""

    def __init__(self, tokenizer: Any, cache: Any, report: Callable[[Moment], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.cache, self.report = cache, report
        self.text, self.tokens, self.start = "", -1, 0.0  # the prompt is put first

    def put(self, value: Any) -> None:
        """Called by `generate` with the prompt, then with each token."""
        super().put(value)
        self.tokens += 1
        if self.tokens == 1:
            self.start = time.perf_counter()
        if self.tokens:
            self.report(self.moment())

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Add a piece of text that is whole."""
        self.text += text

    def moment(self) -> Moment:
        """How far it is."""
        return Moment(
            text=self.text.strip(),
            new_tokens=self.tokens,
            cached_tokens=self.cache.get_seq_length(),
            cache_bytes=cache_bytes(self.cache),
            seconds=time.perf_counter() - self.start,
        )


class _Given(StoppingCriteria):
    """Stops generation at either of two events."""

    def __init__(self, ended: threading.Event) -> None:
        self.up, self.ended = threading.Event(), ended

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        stop = self.up.is_set() or self.ended.is_set()
        return torch.full((len(input_ids),), stop, device=input_ids.device)


def live_answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    record: Record,
    *,
    max_new_tokens: int,
    ended: threading.Event,
) -> Iterator[Moment]:
    """A greedy answer to a chat, after each of its tokens, until nobody listens or `ended` is set.

    Raises `InputError` where the model has no room for it.
    """
    if ended.is_set():
        return
    inputs = encode(processor, [record], generation_prompt=True).to(model.device)
    _check_room(model.config, inputs["input_ids"].shape[1], max_new_tokens)
    converted = getattr(model.config, "mla", None) is not None
    cache = LatentCache() if converted else DynamicCache(config=model.config.get_text_config(decoder=True))
    news: SimpleQueue[Moment | BaseException | None] = SimpleQueue()
    watch, stop = _Watch(processor.tokenizer, cache, news.put), _Given(ended)

    @torch.no_grad()
    def run() -> None:
        try:
            model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                **cache_argument(cache),
                streamer=watch,
                logits_processor=LogitsProcessorList([Finite()]),
                stopping_criteria=StoppingCriteriaList([stop]),
            )
            news.put(watch.moment())
            news.put(None)
        except BaseException as error:  # raised again where the answer is read
            news.put(error)

    # at its end a process waits for this thread: one that is killed within PyTorch takes the process down
    thread = threading.Thread(target=run, daemon=False)
    thread.start()
    try:
        while (moment := news.get()) is not None:
            if isinstance(moment, BaseException):
                raise moment
            yield moment
    finally:
        stop.up.set()
        thread.join()


def room_of(config: Any) -> int | None:
    """Tokens that a chat of a model can have, None if its config does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def _check_room(config: Any, tokens: int, max_new_tokens: int) -> None:
    room = room_of(config)
    if room is not None and tokens + max_new_tokens > room:
        raise InputError(
            f"the conversation has {tokens:,} tokens, an answer up to {max_new_tokens:,}, and the model has "
            f"room for {room:,}; begin a new one"
        )
