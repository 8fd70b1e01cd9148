"""How well a model answers: exact match in real generation, and loss and KL on the answers' tokens.

Shapes: B batch, T tokens, A answer tokens, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from mha2mla_vlm.data import IGNORE_INDEX, Record, encode, encode_with_labels, message_text
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.families import get_family
from mha2mla_vlm.progress import track

DEFAULT_KIND = "answer"


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
    tells what decoding would give.
    """
    inside = predicted(batch)[0]
    return all_right(inside.nonzero()[:, 0], guesses == batch["labels"][0, 1:][inside])


def all_right(places: torch.Tensor, right: torch.Tensor) -> list[bool]:
    """Of each run of neighbouring `places [A]`, whether all of them are `right [A]`."""
    starts = (places.diff() > 1).nonzero()[:, 0] + 1
    return [bool(run.all()) for run in right.tensor_split(starts.cpu()) if len(run)]


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


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[Record],
    *,
    baseline: PreTrainedModel | None = None,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Measure a model on every answer of `records`, each given the chat before it.

    Returns `records`, `answers`, `exact_match`, `cross_entropy` (nats per answer token), `by_kind`,
    and with a `baseline` also `kl` (nats per answer token), `agreement` (share of answers that are
    the baseline's), `baseline_exact_match`.
    """
    asked = [(record, index) for record in records for index in record.answers()]
    if not asked:
        raise InputError("the records hold no assistant messages; there is nothing to evaluate")
    if baseline is not None:
        check_comparable(model, baseline)
    expected = [message_text(record.messages[index]).strip() for record, index in asked]
    kinds = [record.messages[index].get("kind", DEFAULT_KIND) for record, index in asked]
    prompts = [record.before(index) for record, index in asked]
    longest = max(len(processor.tokenizer(text)["input_ids"]) for text in expected)
    budget: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": longest + 8}
    answers = generate_answers(model, processor, prompts, **budget)
    right = [answer == wanted for answer, wanted in zip(answers, expected, strict=True)]
    loss, kl = _losses(model, processor, records, baseline)
    result: dict[str, Any] = {
        "records": len(records),
        "answers": len(asked),
        "exact_match": sum(right) / len(right),
        "cross_entropy": loss,
        "by_kind": _by_kind(kinds, right),
    }
    if baseline is not None:
        theirs = generate_answers(baseline, processor, prompts, **budget)
        result["kl"] = kl
        result["agreement"] = sum(a == b for a, b in zip(answers, theirs, strict=True)) / len(theirs)
        result["baseline_exact_match"] = sum(a == b for a, b in zip(theirs, expected, strict=True)) / len(
            theirs
        )
    return result


def check_comparable(model: PreTrainedModel, baseline: PreTrainedModel) -> None:
    """Raise `InputError` unless both models are of one family and one vocabulary."""
    sides = [
        (get_family(m.config.model_type).model_type, m.config.get_text_config(decoder=True).vocab_size)
        for m in (model, baseline)
    ]
    if sides[0] != sides[1]:
        raise InputError(
            f"the baseline is {sides[1]}, the model {sides[0]}; compare within family and vocabulary"
        )


def _by_kind(kinds: Sequence[str], right: Sequence[bool]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[bool]] = defaultdict(list)
    for kind, is_right in zip(kinds, right, strict=True):
        groups[kind].append(is_right)
    return {
        kind: {"answers": len(marks), "exact_match": sum(marks) / len(marks)}
        for kind, marks in sorted(groups.items())
    }


def _losses(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[Record],
    baseline: PreTrainedModel | None,
) -> tuple[float, float]:
    """Cross-entropy of the answers, and KL to the baseline (0 without one), per answer token."""
    visual = get_family(model.config.model_type).visual_token_ids(model.config)
    loss, divergence, count = 0.0, 0.0, 0
    for record in track(records, "measuring loss"):
        if not record.answers():
            continue
        batch = encode_with_labels(processor, [record], visual).to(model.device)
        log_probs = answer_log_probs(model, batch)
        targets = batch["labels"][:, 1:][predicted(batch)]
        loss += float(nn.functional.nll_loss(log_probs, targets, reduction="sum"))
        if baseline is not None:
            divergence += kl_sum(log_probs, answer_log_probs(baseline, batch))
        count += len(targets)
    return loss / count, max(0.0, divergence / count)
