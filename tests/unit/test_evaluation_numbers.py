"""Measures of models whose numbers are none."""

import math

import pytest
import torch
from helpers import answered, original

from mha2mla_vlm import InputError, evaluate
from mha2mla_vlm.evaluation.answers import as_kl


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
