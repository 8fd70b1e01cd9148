"""The model that lmms-eval calls `mha2mla`."""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator, DistributedType
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from mha2mla_vlm.data.records import Record
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.evaluation.answers import generate_answers
from mha2mla_vlm.model.checkpoint import load, load_processor

MAX_NEW_TOKENS = 256  # where a task does not say
DECODING = ("max_new_tokens", "num_beams")
SAMPLING = ("temperature", "top_p", "top_k")


class MHA2MLA(lmms):
    """An original or a converted checkpoint, by folder, hub id or `zoo:NAME` (`pretrained`).

    `cache_bits` (8, 4 or 2) quantises the cache of a converted model. Images only; answers are
    generated, greedily unless a task says otherwise. Raises `InputError` for what is not supported.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        *,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        cache_bits: int | None = None,
        attn_implementation: str = "sdpa",
        system_prompt: str = "",
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        many = self.accelerator.distributed_type != DistributedType.NO
        target = self.accelerator.device if many or device is None else device
        options = {"dtype": dtype, "attn_implementation": attn_implementation}
        self.model = load(pretrained, **options).to(target).eval()
        if cache_bits is not None and getattr(self.model.config, "mla", None) is None:
            raise InputError(f"cache_bits is for converted models; {pretrained!r} is an original")
        self.processor = load_processor(pretrained)
        self.batch_size = int(batch_size)
        self.system_prompt = self._resolve_system_prompt(system_prompt)
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.cache = {}
        if cache_bits is not None:
            self.cache = {"cache_implementation": "quantized", "cache_config": {"nbits": int(cache_bits)}}

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers in the order of the requests, those of like settings in batches."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[json.dumps(request.args[2] or {}, sort_keys=True)].append(index)
        answers = [""] * len(requests)
        for settings, members in groups.items():
            options, stops = generation_options(json.loads(settings))
            prompts = [self._prompt(*requests[index].args) for index in members]
            given = (self.model, self.processor, prompts)
            found = generate_answers(*given, batch_size=self.batch_size, **options, **self.cache)
            for index, text in zip(members, found, strict=True):
                answers[index] = until(text, stops)
                self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
        return answers

    def _prompt(self, _: str, messages: Any, __: Any, document: int, task: str, split: str) -> Record:
        return chat_record(
            self._apply_system_prompt(messages(self.task_dict[task][split][document]), self.system_prompt)
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("mha2mla answers one round; choose a task of output type generate_until")

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not supported: lmms-eval asks it only of models without chat templates."""
        raise NotImplementedError("mha2mla generates answers; choose a task of output type generate_until")


def chat_record(messages: list[dict[str, Any]]) -> Record:
    """Our form of a chat in lmms-eval's; raises `InputError` for video and audio."""
    chat = ChatMessages(messages=messages)
    images, videos, audios = chat.extract_media()
    if videos or audios:
        raise InputError("mha2mla takes images and text; choose a task without video and audio")
    return Record(
        messages=[
            {
                "role": message.role,
                "content": [
                    {"type": "image"} if part.type == "image" else {"type": "text", "text": part.text}
                    for part in message.content
                ],
            }
            for message in chat.messages
        ],
        images=images,
        source="lmms-eval",
    )


def generation_options(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What `generate` is given for a task's settings, and the texts that end an answer.

    A temperature above 0 samples unless the task says otherwise. What is not about decoding is left out.
    """
    stops, temperature = given.get("until") or [], given.get("temperature")
    draws = bool(given.get("do_sample", temperature)) and temperature != 0
    names = DECODING + SAMPLING if draws else DECODING
    options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": draws}
    options |= {name: given[name] for name in names if given.get(name) is not None}
    return options, [stops] if isinstance(stops, str) else list(stops)


def until(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of the texts that end it."""
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text.strip()
