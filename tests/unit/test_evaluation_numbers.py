"""Measures over chats and their intervals, and those of models whose numbers are none."""

import math

import pytest
import torch
from helpers import answered, original

from mha2mla_vlm import InputError, evaluate
from mha2mla_vlm.data.records import Record
from mha2mla_vlm.evaluation.answers import Answered, as_kl, summary
from mha2mla_vlm.evaluation.intervals import bootstrap_interval, sign_test


def answers(*found):
    """Answers of one chat: what was found and what the baseline found, where "7" is right; KL 0.5 a token."""
    turns = ({"role": role, "content": [{"type": "text", "text": "7"}]} for role in ("user", "assistant"))
    record = Record(messages=list(turns))
    return [
        Answered(record=record, index=1, found=mine, theirs=theirs, tokens=2, loss=1.0, kl=1.0)
        for mine, theirs in found
    ]


def test_an_interval_is_that_of_a_mean_of_independent_chats():
    rng = torch.Generator().manual_seed(1)
    right = (torch.rand(400, generator=rng) < 0.8).long().tolist()
    low, high = bootstrap_interval(right, [1] * 400)
    share = sum(right) / 400
    half = 1.96 * math.sqrt(share * (1 - share) / 400)
    assert low == pytest.approx(share - half, abs=0.01)
    assert high == pytest.approx(share + half, abs=0.01)
    assert bootstrap_interval(right, [1] * 400) == (low, high)


def test_answers_of_one_chat_are_not_independent():
    """Four chats of a hundred like answers show as little as four answers."""
    chats = [answers(*[(found, "7")] * 100) for found in ("7", "7", "8", "7")]
    low, high = summary([answer for chat in chats for answer in chat])["exact_match_interval"]
    assert (low, high) == tuple(summary([chat[0] for chat in chats])["exact_match_interval"])
    assert high - low > 0.5


@pytest.mark.parametrize(
    ("worse", "better", "chance"),
    [(0, 0, 1.0), (1, 0, 1.0), (3, 3, 1.0), (5, 0, 2 / 32), (6, 0, 2 / 64), (1, 8, 2 * 10 / 512)],
)
def test_changes_that_chance_may_bring(worse, better, chance):
    assert sign_test(worse, better) == sign_test(better, worse) == pytest.approx(chance)


def test_a_summary_counts_what_became_worse_and_better():
    found = summary([*answers(("8", "7"), ("7", "7")), *answers(("7", "6"), ("5", "6"), ("8", "7"))])
    assert (found["worse"], found["better"]) == (2, 1)
    assert found["baseline_exact_match"] - found["exact_match"] == pytest.approx((2 - 1) / 5)
    assert found["kl"] == 0.5
    assert found["kl_interval"] == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_kl_that_is_no_number_is_refused(value):
    with pytest.raises(InputError, match="not finite"):
        as_kl(value)
    assert as_kl(-1e-9) == 0.0


def test_a_broken_model_is_no_perfect_one():
    """NaN was reported as a KL of 0."""
    model, processor = original("llava")
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(InputError, match="check its weights"):
        evaluate(model, processor, answered("llava", 2), baseline=original("llava")[0])
