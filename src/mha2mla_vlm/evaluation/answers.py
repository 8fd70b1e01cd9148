"""How well a model answers: exact match in real generation, and loss and KL on the answers' tokens.

Shapes: B batch, T tokens, A answer tokens, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from mha2mla_vlm.data.records import IGNORE_INDEX, Record, encode, encode_with_labels, message_text
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.evaluation.intervals import bootstrap_interval
from mha2mla_vlm.model.checkpoint import load_config, load_processor
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.utils.progress import track

DEFAULT_KIND = "answer"
# what sets how many tokens an image takes
IMAGE_FIELDS = ("image_size", "patch_size", "spatial_merge_size", "image_grid_pinpoints")


@torch.no_grad()
def answer_log_probs(model: PreTrainedModel, batch: BatchFeature) -> torch.Tensor:
    """Log probabilities of answer tokens, `[A, V]` in float32; of all tokens if there is no answer."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return logits[predicted(batch)].float().log_softmax(-1)


def predicted(batch: BatchFeature) -> torch.Tensor:
    answers = batch["labels"][:, 1:] != IGNORE_INDEX
    return answers if bool(answers.any()) else batch["attention_mask"][:, 1:].bool()


def answers_right(guesses: torch.Tensor, batch: BatchFeature) -> list[bool]:
    """Which answers of one chat `guesses [A]`, the likeliest tokens, get exactly right.

    Greedy decoding follows a right answer up to its first error, so one pass over the right answers
    shows what decoding would give.
    """
    inside = predicted(batch)[0]
    return all_right(inside.nonzero()[:, 0], guesses == batch["labels"][0, 1:][inside])


def all_right(places: torch.Tensor, right: torch.Tensor) -> list[bool]:
    """Of each run of neighbouring `places [A]`, whether all of them are `right [A]`."""
    return [bool(run.all()) for run in right.tensor_split(_ends(places)) if len(run)]


def _ends(places: torch.Tensor) -> torch.Tensor:
    """Where runs of neighbouring `places [A]` end, but for the last."""
    return ((places.diff() > 1).nonzero()[:, 0] + 1).cpu()


def as_kl(value: float) -> float:
    """A mean KL divergence, which rounding may put below 0; raises `InputError` if it is not finite."""
    if not math.isfinite(value):
        raise InputError(f"the KL divergence is {value}: a model's logits are not finite; check its weights")
    return max(0.0, value)


def kl_sum(log_probs: torch.Tensor, expected: torch.Tensor) -> float:
    """KL(expected || found) of log probabilities `[A, V]`, summed."""
    return float(
        nn.functional.kl_div(log_probs, expected.to(log_probs.device), reduction="sum", log_target=True)
    )


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: Sequence[Record],
    *,
    batch_size: int,
    **options: Any,
) -> list[str]:
    """Answers to chats that end where an answer is due, in left-padded batches of like length.

    Greedy ones, unless `options` of `generate` say otherwise.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].images), len(prompts[i].messages)))
    answers = [""] * len(prompts)
    starts = range(0, len(order), batch_size)
    for start in track(starts, "generating answers"):
        rows = order[start : start + batch_size]
        inputs = encode(processor, [prompts[i] for i in rows], generation_prompt=True).to(model.device)
        output = model.generate(**inputs, **({"do_sample": False} | options))
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text.strip()
    return answers


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One answer: `record.messages[index]` is right, `found` is the model's, `theirs` the baseline's.

    `loss` and `kl` (to the baseline) are sums over the `tokens` of the right answer, in nats.
    """

    record: Record
    index: int
    found: str
    theirs: str | None
    tokens: int
    loss: float
    kl: float | None

    @property
    def kind(self) -> str:
        """What kind of question it answers."""
        return str(self.record.messages[self.index].get("kind", DEFAULT_KIND))

    @property
    def expected(self) -> str:
        """The right answer."""
        return message_text(self.record.messages[self.index]).strip()


def summary(answers: Sequence[Answered]) -> dict[str, Any]:
    """Shares and means: `answers`, `exact_match`, `cross_entropy` (nats per answer token), and with a
    baseline also `kl` (nats per answer token), `agreement` (share of answers that are the baseline's),
    `baseline_exact_match`, and how many answers it alone has right (`worse`) or wrong (`better`).

    `exact_match_interval` and `kl_interval` are 95% bootstrap intervals over chats.
    """
    tokens = sum(answer.tokens for answer in answers)
    right = [answer.found == answer.expected for answer in answers]
    found: dict[str, Any] = {
        "answers": len(answers),
        "exact_match": sum(right) / len(answers),
        "exact_match_interval": _interval(answers, right, [1] * len(answers)),
        "cross_entropy": sum(answer.loss for answer in answers) / tokens,
    }
    if answers[0].kl is not None:
        losses = [answer.kl or 0.0 for answer in answers]
        found["kl"] = as_kl(sum(losses) / tokens)
        found["kl_interval"] = _interval(answers, losses, [answer.tokens for answer in answers])
        found["agreement"] = sum(answer.found == answer.theirs for answer in answers) / len(answers)
        theirs = [answer.theirs == answer.expected for answer in answers]
        found["baseline_exact_match"] = sum(theirs) / len(answers)
        found["worse"] = sum(b and not a for a, b in zip(right, theirs, strict=True))
        found["better"] = sum(a and not b for a, b in zip(right, theirs, strict=True))
    return found


def _interval(answers: Sequence[Answered], sums: Sequence[float], counts: Sequence[int]) -> list[float]:
    """`kl_interval` of what answers have, by their chats."""
    by_chat: dict[int, tuple[float, int]] = {}
    for answer, value, count in zip(answers, sums, counts, strict=True):
        total, number = by_chat.get(id(answer.record), (0.0, 0))
        by_chat[id(answer.record)] = total + value, number + count
    return kl_interval(*zip(*by_chat.values(), strict=True))


def kl_interval(sums: Sequence[float], counts: Sequence[int]) -> list[float]:
    """`bootstrap_interval` of chats, never below 0, where rounding may put KL."""
    return [max(0.0, end) for end in bootstrap_interval(sums, counts)]


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[Record],
    *,
    baseline: PreTrainedModel | None = None,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Measure a model on every answer of `records`, each given the chat before it.

    Returns the `summary` of all answers, the number of `records`, and the same `by_kind` of question.
    """
    answers = evaluate_answers(model, processor, records, baseline=baseline, batch_size=batch_size)
    return {"records": len(records), **summary(answers), "by_kind": by_kind(answers)}


def by_kind(answers: Sequence[Answered]) -> dict[str, dict[str, Any]]:
    """The `summary` of each kind of question."""
    kinds = sorted({answer.kind for answer in answers})
    return {kind: summary([answer for answer in answers if answer.kind == kind]) for kind in kinds}


def evaluate_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[Record],
    *,
    baseline: PreTrainedModel | None = None,
    batch_size: int = 16,
) -> list[Answered]:
    """Every answer of `records`, one by one; `evaluate` sums them up."""
    asked = [(record, index) for record in records for index in record.answers()]
    if not asked:
        raise InputError("the records hold no assistant messages; there is nothing to evaluate")
    if baseline is not None:
        check_comparable(model, baseline)
    prompts = [record.before(index) for record, index in asked]
    texts = [message_text(record.messages[index]).strip() for record, index in asked]
    longest = max(len(processor.tokenizer(text)["input_ids"]) for text in texts)
    given: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": longest + 8}
    found = generate_answers(model, processor, prompts, **given)
    theirs: list[Any] = [None] * len(asked)
    if baseline is not None:
        theirs = generate_answers(baseline, processor, prompts, **given)
    losses = _losses(model, processor, records, baseline)
    return [
        Answered(record=record, index=index, found=mine, theirs=other, tokens=tokens, loss=loss, kl=kl)
        for (record, index), mine, other, (tokens, loss, kl) in zip(asked, found, theirs, losses, strict=True)
    ]


def check_comparable(model: PreTrainedModel, baseline: PreTrainedModel) -> None:
    """Raise `InputError` unless both models are of one family and take the same tokens and images."""
    _check_configs(model.config, baseline.config)


def check_baseline(checkpoint: str, baseline: str) -> None:
    """`check_comparable` of models by their names, and of their vocabularies, before weights are loaded."""
    _check_configs(load_config(checkpoint), load_config(baseline))
    tokens, theirs = (load_processor(name).tokenizer.get_vocab() for name in (checkpoint, baseline))
    by_id = {index: token for token, index in theirs.items()}
    for token, index in tokens.items():
        if by_id.get(index, token) != token:  # one of the two may have tokens beyond those of the other
            raise InputError(
                f"token {index} is {token!r} to {checkpoint!r} and {by_id[index]!r} to the baseline "
                f"{baseline!r}; give a baseline with the same vocabulary"
            )


def _check_configs(config: PreTrainedConfig, baseline: PreTrainedConfig) -> None:
    sides = _inputs(config), _inputs(baseline)
    for what, ours in sides[0].items():
        if (theirs := sides[1][what]) != ours:
            raise InputError(
                f"the baseline has {what} {theirs}, the model {ours}; compare within one family, with the "
                "same tokens and images"
            )


def _inputs(config: PreTrainedConfig) -> dict[str, Any]:
    """What a model's inputs depend on, by name."""
    family, vision = get_family(config.model_type), config.vision_config
    return {
        "family": family.model_type,
        "vocab_size": config.get_text_config(decoder=True).vocab_size,
        "visual tokens": family.visual_token_ids(config),
        **{name: getattr(vision, name, getattr(config, name, None)) for name in IMAGE_FIELDS},
    }


def _losses(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[Record],
    baseline: PreTrainedModel | None,
) -> Iterator[tuple[int, float, float | None]]:
    """Of each answer its number of tokens, its cross-entropy and its KL to the baseline, summed over them."""
    visual = get_family(model.config.model_type).visual_token_ids(model.config)
    for record in track(records, "measuring loss"):
        if not record.answers():
            continue
        batch = encode_with_labels(processor, [record], visual).to(model.device)
        log_probs = answer_log_probs(model, batch)
        targets = batch["labels"][:, 1:][predicted(batch)]
        losses = nn.functional.nll_loss(log_probs, targets, reduction="none")
        divergences = losses.new_zeros(len(losses))
        if baseline is not None:
            pair = log_probs, answer_log_probs(baseline, batch).to(log_probs.device)
            divergences = nn.functional.kl_div(*pair, reduction="none", log_target=True).sum(-1)
        cuts = _ends(predicted(batch)[0].nonzero()[:, 0])
        for loss, divergence in zip(losses.tensor_split(cuts), divergences.tensor_split(cuts), strict=True):
            yield len(loss), float(loss.sum()), None if baseline is None else float(divergence.sum())
