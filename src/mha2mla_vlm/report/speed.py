"""Seconds that answers take, of the original and the converted model in turn."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin
from transformers.generation.streamers import BaseStreamer

from mha2mla_vlm.data.records import Record, encode
from mha2mla_vlm.utils.machine import device_name
from mha2mla_vlm.utils.progress import track

NEW_TOKENS = 17


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Medians of `answers` answers of `new_tokens` tokens, each asked alone; pairs are of the original and of
    the converted model: seconds to the `first` token, and for each `later` one.
    """

    machine: str
    on_gpu: bool
    dtype: str
    answers: int
    prompt_tokens: int
    new_tokens: int
    first: tuple[float, float]
    later: tuple[float, float]


class _Clock(BaseStreamer):
    """When `generate` began, and when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with each token, which is on the CPU by then."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called last."""


def measure_speed(
    model: PreTrainedModel,
    baseline: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[Record],
) -> Speed:
    """Time the last answer of each chat, in turn by both models, after one that is not counted.

    Every answer gets the same number of tokens, whatever it says.
    """
    prompts = [encode(processor, [r.before(r.answers()[-1])], generation_prompt=True) for r in records]
    sides = (baseline, model)
    for side in sides:
        _seconds(side, prompts[0])
    taken = [[_seconds(side, prompt) for side in sides] for prompt in track(prompts, "timing answers")]
    (first, our_first), (later, our_later) = (
        [statistics.median(pair[side][part] for pair in taken) for side in range(len(sides))]
        for part in range(2)
    )
    return Speed(
        machine=device_name(model.device),
        on_gpu=model.device.type != "cpu",
        dtype=str(model.dtype).removeprefix("torch."),
        answers=len(prompts),
        prompt_tokens=int(statistics.median(prompt["input_ids"].shape[1] for prompt in prompts)),
        new_tokens=NEW_TOKENS,
        first=(first, our_first),
        later=(later, our_later),
    )


@torch.no_grad()
def _seconds(model: PreTrainedModel, prompt: Any) -> tuple[float, float]:
    """Seconds to the first token, and for each later one."""
    clock = _Clock()
    model.generate(
        **prompt.to(model.device),
        do_sample=False,
        num_beams=1,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        streamer=clock,
    )
    begin, first, *_, last = clock.times
    return first - begin, (last - first) / (NEW_TOKENS - 1)
