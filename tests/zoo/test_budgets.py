"""Nothing of ours at the same budget beats the default, nor does less of it, on chats that it never saw."""

import itertools

import pytest
import torch

from mha2mla_vlm import ConversionConfig, bytes_per_token, convert, load, load_processor, make_profile
from mha2mla_vlm.conversion.config import ENOUGH
from mha2mla_vlm.data.records import encode_with_labels
from mha2mla_vlm.evaluation.answers import answer_log_probs, kl_sum
from mha2mla_vlm.evaluation.intervals import bootstrap_interval
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.zoo.chats import zoo_records

BUDGETS = (0.25, 0.125, 0.0625, 0.04)
BITS = ("auto", "16", "mixed")


@pytest.mark.slow
def test_the_default_is_best_at_every_budget():
    family = "qwen2_5_vl"
    model, processor = load(f"zoo:{family}", dtype=torch.float32), load_processor(f"zoo:{family}")
    visual = get_family(family).visual_token_ids(model.config)
    chats = zoo_records(family, split="test", samples=80, seed=0)
    batches = [encode_with_labels(processor, [chat], visual) for chat in chats]
    expected = [answer_log_probs(model, batch) for batch in batches]
    calibration = zoo_records(family, split="train", samples=64, seed=1)
    profile = make_profile(model, processor, calibration)

    def measured(budget, bits):
        config = ConversionConfig(budget=budget, latent_bits=bits)
        small = convert(model, processor, calibration, config, profile=profile)
        assert bytes_per_token(small.config) <= budget * bytes_per_token(model.config)
        pairs = zip(batches, expected, strict=True)
        return [kl_sum(answer_log_probs(small, batch), right) for batch, right in pairs]

    found = {key: measured(*key) for key in itertools.product(BUDGETS, BITS)}

    def assert_no_worse(ours, theirs):
        """Beyond chance, by more than what 16 bits may cost."""
        pairs = zip(found[ours], found[theirs], strict=True)
        low, _ = bootstrap_interval([a - b for a, b in pairs], [len(right) for right in expected])
        assert low <= ENOUGH, (ours, theirs)

    for budget in BUDGETS:
        for bits in BITS[1:]:
            assert_no_worse((budget, "auto"), (budget, bits))
    for more, less in itertools.combinations(BUDGETS, 2):
        assert_no_worse((more, "auto"), (less, "auto"))
    assert found[BUDGETS[-1], "auto"] != found[BUDGETS[-1], "16"]  # where 16 bits fail
