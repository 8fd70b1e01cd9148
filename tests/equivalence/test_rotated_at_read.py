"""Keys that are rotated when they are read: nothing lost at full rank, what is cached, what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import (
    answered,
    original,
    piecewise_logits,
    prompt_inputs,
    random_mla,
    real_tokens,
    set_attention,
    whole_logits,
)

from mha2mla_vlm import load
from mha2mla_vlm.algorithms.factorization import factorization
from mha2mla_vlm.algorithms.pair_selection import high
from mha2mla_vlm.algorithms.pair_selection.base import RopeSelection
from mha2mla_vlm.config import AttentionSizes, MLAConfig
from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.describe import describe
from mha2mla_vlm.conversion.pipeline import convert
from mha2mla_vlm.conversion.weights import (
    factored_weights,
    layer_factors,
    partial_rope_weights,
    rebuild,
    rotated_at_read,
)
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model import blocks, interpolated, rebuilt
from mha2mla_vlm.model.cache.latent import LatentCache, bytes_per_token, cache_bytes
from mha2mla_vlm.model.checkpoint import save
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.kernels import cpu_rotated
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.utils.compat import cache_argument

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
BATCH = ["image", "text", "two images"]


def of_full_rank(family, rope_dim):
    """A model, with only `rope_dim` dims rotated, and the same with its keys made of latents when read."""
    model, processor = original(family)
    sizes = AttentionSizes.of(model.config)
    pairs = high.pairs(sizes.head_dim // 2, rope_dim // 2).repeat(sizes.kv_heads, 1)
    mla = MLAConfig(
        qk_rope_head_dim=rope_dim,
        kv_lora_rank=sizes.numbers_per_token,
        rotate_at="read",
        factorization="weight-svd",
    )
    partial, made = [], []
    for index, layer in enumerate(decoder_layers(model)):
        partial.append(partial_rope_weights(layer.self_attn, RopeSelection(pairs=pairs)))
        whole = rotated_at_read(partial[-1])
        given = (whole, None, mla.layer(index), factorization(mla.factorization))
        made.append(factored_weights(whole, layer_factors(*given, head_dim=sizes.head_dim)))
    before = rebuild(model, replace(mla, kv_lora_rank=None, rotate_at="write"), partial)
    return model if rope_dim == sizes.head_dim else before, rebuild(model, mla, made), processor


@pytest.mark.parametrize("rope_dim", [64, 32])
@pytest.mark.parametrize("prompts", [["two images"], BATCH], ids=str)
def test_full_rank_gives_the_logits_of_all_pairs(family, rope_dim, prompts):
    model, small, processor = of_full_rank(family, rope_dim)
    inputs = prompt_inputs(family, processor, prompts)
    expected = real_tokens(whole_logits(model, inputs), inputs)
    torch.testing.assert_close(real_tokens(whole_logits(small, inputs), inputs), expected, **CLOSE)


@pytest.mark.parametrize("limit", [0, 10**6], ids=["expanded", "absorbed"])
def test_keys_are_rebuilt_in_blocks(monkeypatch, family, limit):
    monkeypatch.setattr(rebuilt, "BLOCK", 7)
    model, processor = random_mla(family, rotate_at="read")
    inputs = prompt_inputs(family, processor, ["two images"])
    expected, cache = whole_logits(model, inputs), LatentCache()
    total = inputs["input_ids"].shape[1]
    got = piecewise_logits(set_attention(model, absorb_limit=limit), inputs, [total - 5, total - 1], cache)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert cache_bytes(cache) == total * bytes_per_token(model.config, itemsize=4)


@pytest.mark.parametrize(("rope_dim", "backend"), [(64, "torch"), (16, "torch"), (64, "cpp")])
@pytest.mark.parametrize("prompts", [["two images"], ["text", "text"]], ids=str)
def test_turns_are_interpolated_within_blocks(monkeypatch, family, prompts, rope_dim, backend):
    monkeypatch.setattr(interpolated, "BLOCK", 0)
    monkeypatch.setattr(blocks, "WIDTHS", (8, 16))
    monkeypatch.setattr(cpu_rotated, "WIDTH", cpu_rotated.TILE)
    plans, make = [], blocks.plan_blocks
    monkeypatch.setattr(interpolated, "plan_blocks", lambda *x: plans.append(make(*x)) or plans[-1])
    model, processor = random_mla(family, rotate_at="read", rope_dim=rope_dim)
    inputs = prompt_inputs(family, processor, prompts)
    expected, total = whole_logits(model, inputs), inputs["input_ids"].shape[1]
    got = piecewise_logits(
        set_attention(model, absorb_limit=2, decode_backend=backend),
        inputs,
        [total - 2, total - 1],
        LatentCache(),
    )
    torch.testing.assert_close(got, expected, **CLOSE)
    if not get_family(family).model_type.startswith("qwen3_vl"):  # whose fast pairs are of all axes
        interpolated_some = any(some.terms for plan in plans if plan for some in plan)
        assert interpolated_some or rope_dim == 16 or backend == "cpp"
    assert len(plans) == (2 if rope_dim == 64 else 8)  # all pairs: one plan a step for all layers


def test_wrong_positions_change_the_logits(family):
    """Negative control: what is cached of positions is what keys are rotated by."""
    model, processor = random_mla(family, rotate_at="read")
    inputs = prompt_inputs(family, processor, ["image"])
    total, logits = inputs["input_ids"].shape[1], []
    for shift in (0, 3):
        cache = LatentCache()
        piecewise_logits(model, inputs, [], cache)
        cache.crop(-1)
        cache.layers[0].positions[..., : total // 2] += shift
        last = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": inputs["attention_mask"]}
        positions = cache.layers[0].positions[..., -1:].long()
        last["position_ids"] = positions if len(positions) > 1 else positions[0]
        with torch.no_grad():
            logits.append(model(**last, **cache_argument(cache)).logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_layers_may_differ_in_when_they_rotate(family, tmp_path):
    model, processor = random_mla(family, rotate_at=["write", "read", "write", "read"])
    inputs = prompt_inputs(family, processor, ["two images"])
    total, expected, cache = inputs["input_ids"].shape[1], whole_logits(model, inputs), LatentCache()
    got = piecewise_logits(model, inputs, [total - 2, total - 1], cache)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert cache_bytes(cache) == total * bytes_per_token(model.config, itemsize=4)
    save(model, processor, tmp_path / "mixed")
    torch.testing.assert_close(whole_logits(load(tmp_path / "mixed", dtype="float32"), inputs), expected)
    assert describe(str(tmp_path / "mixed"))["rotate_at"] == ["write", "read", "write", "read"]


@pytest.mark.parametrize(
    "sizes", [{"budget": 0.25}, {"d_kv": 32}, {"d_kv": 32, "qk_rope_head_dim": 32}], ids=str
)
def test_a_model_is_converted_to_it(family, sizes):
    model, processor = original(family)
    before = copy.deepcopy(model.state_dict())
    small = convert(model, processor, answered(family), ConversionConfig(rotate_at="read", **sizes))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert small.mla_config.rotate_at == "read"
    assert set(small.mla_config.kl) == (
        {"partial_rope", "factorization"} if "qk_rope_head_dim" in sizes else {"factorization"}
    )
    assert bytes_per_token(small.config) <= bytes_per_token(model.config) * 0.25 + 4 * 3
    if "budget" in sizes:
        assert bytes_per_token(small.config) <= bytes_per_token(model.config) * 0.25
        assert len(small.mla_config.predicted_kl) == 4


def test_what_does_not_go_with_it_is_refused(family):
    with pytest.raises(InputError, match="'split' does not go with rotate_at read"):
        ConversionConfig(rotate_at="read", factorization="split")
    with pytest.raises(InputError, match="rotate_at 'later': give write, read or auto"):
        ConversionConfig(rotate_at="later")
    with pytest.raises(InputError, match="rotate_at 'later'"):
        MLAConfig(qk_rope_head_dim=16, rotate_at="later")
    with pytest.raises(InputError, match="needs kv_lora_rank"):
        MLAConfig(qk_rope_head_dim=16, rotate_at="read").check(AttentionSizes.of(original(family)[0].config))
