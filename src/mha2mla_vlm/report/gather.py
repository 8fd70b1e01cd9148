"""What a report says, as plain values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from mha2mla_vlm.calibration.activations import Chat, MemoryStates, advance, answer_states, attending, begin
from mha2mla_vlm.config import AttentionSizes, MLAConfig
from mha2mla_vlm.data.records import ImageSource, Record, encode_with_labels, message_text
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.evaluation.answers import Answered, as_kl, by_kind, evaluate_answers, kl_sum, summary
from mha2mla_vlm.model.cache.latent import bytes_per_token
from mha2mla_vlm.model.cache.quantized import QuantizationConfig, quantized_bytes_per_token
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.modeling import attention_of, decoder_layers
from mha2mla_vlm.model.offload import end_modules, logits_of
from mha2mla_vlm.report.speed import Speed, measure_speed
from mha2mla_vlm.utils.progress import track

EXAMPLES = 24
TIMED = 6  # chats
ORIGINAL, CHANGED = "original", "changed"  # streams


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A decoder layer: R (None if it is left as it was), r, the `pairs` that stay rotated by KV head, the KL
    of converting only this layer, predicted and measured, and its spectra by modality.
    """

    rope_dim: int | None
    rank: int | None
    bits: str
    pairs: list[list[int]]
    predicted: float | None
    measured: float | None
    spectra: dict[str, list[tuple[int, float]]]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question about images, its right answer, and what both models say."""

    images: Sequence[ImageSource]
    turns: list[tuple[str, str]]  # role and text
    answer: Answered

    @property
    def agree(self) -> bool:
        """Whether both models say the same."""
        return self.answer.found == self.answer.theirs

    @property
    def change(self) -> str:
        """`worse` if the original alone is right, `better` if the converted model alone is, else empty."""
        right, before = (said == self.answer.expected for said in (self.answer.found, self.answer.theirs))
        return "" if right == before else "better" if right else "worse"


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a page shows. `bytes_per_token` are of the original, of the converted model, and of that in 4
    bits; `itemsize` those of a number. `differing` counts answers, of which `examples` has some.
    """

    name: str
    family: str
    mla: MLAConfig
    sizes: AttentionSizes
    settings: dict[str, Any]
    bytes_per_token: tuple[float, float, float]
    itemsize: int
    quality: dict[str, Any]
    by_kind: dict[str, dict[str, Any]]
    differing: int
    speed: Speed
    layers: list[Layer]
    examples: list[Example]
    commands: list[str]


def gather(
    model: PreTrainedModel,
    baseline: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[Record],
    *,
    name: str,
    findings: dict[str, Any] | None = None,
    commands: Sequence[str] = (),
    layer_samples: int = 16,
    answers: Sequence[Answered] | None = None,
    itemsize: int | None = None,
) -> Report:
    """Measure a converted model beside its original on `records`, and the KL of converting only one layer,
    for each, on the first `layer_samples`.

    `findings` are those of the conversion, `answers` those of the model where it was asked already. A number
    in a cache has `itemsize` bytes, by default as in the model.
    Raises `InputError` for models that cannot be compared, and for records without answers.
    """
    if getattr(model.config, "mla", None) is None:
        raise InputError(f"{name!r} is not a converted model; make one with: mha2mla convert")
    if answers is None:
        answers = evaluate_answers(model, processor, records, baseline=baseline)
    itemsize = itemsize or model.dtype.itemsize
    found = findings or {}
    return Report(
        name=name,
        family=get_family(model.config.model_type).model_type,
        mla=model.mla_config,
        sizes=AttentionSizes.of(model.config),
        settings=found.get("settings", {}),
        bytes_per_token=(
            bytes_per_token(model.config, itemsize=itemsize, original=True),
            bytes_per_token(model.config, itemsize=itemsize),
            quantized_bytes_per_token(model.config, QuantizationConfig(), itemsize=itemsize),
        ),
        itemsize=itemsize,
        quality=summary(answers),
        by_kind=by_kind(answers),
        differing=sum(answer.found != answer.theirs for answer in answers),
        speed=measure_speed(model, baseline, processor, [r for r in records if r.answers()][:TIMED]),
        layers=_layers(
            model, found.get("spectra"), _layer_kl(model, baseline, processor, records[:layer_samples])
        ),
        examples=choose_examples(answers),
        commands=list(commands),
    )


def _layers(
    model: PreTrainedModel, spectra: list[dict[str, Any]] | None, measured: list[float] | None
) -> list[Layer]:
    found, sizes = [], AttentionSizes.of(model.config)
    every_pair = [list(range(sizes.rotary_dim // 2))] * sizes.kv_heads
    for index, layer in enumerate(decoder_layers(model)):
        spec = model.mla_config.layer(index)
        predicted = model.mla_config.predicted_kl
        found.append(
            Layer(
                rope_dim=spec and spec.rope_dim,
                rank=spec and spec.rank,
                bits=", ".join(map(str, spec.bits)) if spec and spec.bits else "",
                pairs=layer.self_attn.rope_pairs.tolist()
                if spec
                else every_pair
                if index in sizes.growing
                else [],
                predicted=None if predicted is None else predicted[index],
                measured=None if measured is None else measured[index],
                spectra={} if spectra is None else spectra[index],
            )
        )
    return found


@torch.no_grad()
def _layer_kl(
    model: PreTrainedModel, baseline: PreTrainedModel, processor: ProcessorMixin, records: Sequence[Record]
) -> list[float] | None:
    """KL of the original model with only one layer converted, for each layer, in nats per answer token."""
    if not records:
        return None
    visual = get_family(baseline.config.model_type).visual_token_ids(baseline.config)
    batches = [encode_with_labels(processor, [record], visual) for record in records]
    states, layers = MemoryStates(), decoder_layers(baseline)
    chats = begin(baseline, batches, visual, baseline.device, states, [ORIGINAL])
    for index, layer in enumerate(layers):
        advance(layer, index, chats, states, ORIGINAL)
    losses = []
    for index in track(range(len(layers)), "measuring each layer"):
        for number in range(len(chats)):
            states[CHANGED, index, number] = states[ORIGINAL, index, number]
        with attending(layers[index], attention_of(decoder_layers(model)[index])):
            advance(layers[index], index, chats, states, CHANGED)
        for above in range(index + 1, len(layers)):
            advance(layers[above], above, chats, states, CHANGED)
        losses.append(_loss(baseline, chats, states))
    return losses


def _loss(model: PreTrainedModel, chats: Sequence[Chat], states: MemoryStates) -> float:
    """KL of the ends of both streams."""
    norm, _ = end_modules(model)
    total, tokens, last = 0.0, 0, len(decoder_layers(model))
    for number, chat in enumerate(chats):
        expected, found = (
            logits_of(model, answer_states(chat, states[stream, last, number].to(model.device), norm))
            .float()
            .log_softmax(-1)
            for stream in (ORIGINAL, CHANGED)
        )
        total, tokens = total + kl_sum(found, expected), tokens + len(expected)
    return as_kl(total / tokens)


def choose_examples(answers: Sequence[Answered]) -> list[Example]:
    """Some answers of every kind and outcome in turn; those that both models give differently come first."""
    outcomes = _grouped([_example(answer) for answer in answers], _outcome)
    groups = [_in_turn(_grouped(group, lambda one: one.answer.kind)) for group in outcomes]
    return sorted(_in_turn(groups)[:EXAMPLES], key=_outcome)


def _example(answer: Answered) -> Example:
    before = answer.record.before(answer.index)
    turns = [(message["role"], message_text(message)) for message in before.messages]
    return Example(images=before.images, turns=turns, answer=answer)


def _outcome(example: Example) -> tuple[bool, int, bool]:
    """Where an example stands: first what became wrong, last what both models have right."""
    right = example.answer.found == example.answer.expected
    return example.agree, ("worse", "better", "").index(example.change), right


def _grouped(examples: Sequence[Example], key: Callable[[Example], Any]) -> list[list[Example]]:
    """Examples of each key, in the keys' order."""
    return [list(group) for _, group in groupby(sorted(examples, key=key), key)]


def _in_turn(groups: Sequence[Sequence[Example]]) -> list[Example]:
    """The first of each group, then the second, and so on."""
    return [example for row in zip_longest(*groups) for example in row if example is not None]
