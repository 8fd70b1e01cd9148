"""Conversion as a whole: budgets, shared profiles, folds and biases in the checkpoint."""

import functools
from dataclasses import replace

import pytest
import torch
from helpers import answered, original, prompt_inputs, whole_logits

from mha2mla_vlm.algorithms.factorization import factorization
from mha2mla_vlm.config import AttentionSizes
from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.pipeline import convert, make_profile
from mha2mla_vlm.conversion.plan import plan
from mha2mla_vlm.conversion.sweep import methods
from mha2mla_vlm.conversion.weights import (
    converted_layer,
    factored_weights,
    layer_factors,
    partial_rope_weights,
)
from mha2mla_vlm.model.cache.latent import bytes_per_token
from mha2mla_vlm.model.checkpoint import load, save
from mha2mla_vlm.model.modeling import decoder_layers

AT_WRITE = ConversionConfig(rotate_at="write")


@functools.cache
def profile(family):
    """A random tiny model's profile for keys rotated at write, with its model and processor."""
    model, processor = original(family)
    return make_profile(model, processor, answered(family), AT_WRITE), model, processor


@pytest.mark.parametrize("budget", [0.6, 0.25])
def test_a_budget_is_kept_and_allocated(family, budget):
    known, model, processor = profile(family)
    small = convert(model, processor, answered(family), replace(AT_WRITE, budget=budget), profile=known)
    mla = small.mla_config
    assert len(mla.qk_rope_head_dim) == len(mla.kv_lora_rank) == len(mla.predicted_kl) == 4
    assert 0.9 * budget <= bytes_per_token(small.config) / bytes_per_token(model.config) <= budget
    assert mla.folded
    assert mla.kl.keys() == {"partial_rope", "factorization"}
    for layer, module in enumerate(decoder_layers(small)):
        spec = mla.layer(layer)
        assert module.self_attn.k_rope_proj.out_features == spec.rope_dim * module.self_attn.kv_heads
        assert module.self_attn.kv_b_proj["text"].in_features == spec.rank


def test_a_size_that_is_given_stays_and_the_other_is_allocated(family):
    known, model, processor = profile(family)
    config = ConversionConfig(budget=0.5, qk_rope_head_dim=32)
    mla = convert(model, processor, answered(family), config, profile=known).mla_config
    assert mla.qk_rope_head_dim == [32] * 4
    config = ConversionConfig(budget=0.5, d_kv=16)
    small = convert(model, processor, answered(family), config, profile=known)
    assert small.mla_config.kv_lora_rank == [16 * decoder_layers(small)[0].self_attn.kv_heads] * 4


def test_a_shared_profile_gives_the_conversion_that_its_own_would(family):
    known, model, processor = profile(family)
    config = ConversionConfig(qk_rope_head_dim=24, d_kv=12)
    shared, own = (
        convert(model, processor, answered(family), config, profile=given).state_dict()
        for given in (known, None)
    )
    assert shared.keys() == own.keys()
    assert all(torch.equal(shared[key], own[key]) for key in own)


def test_a_profile_for_another_method_is_an_error(family):
    known, model, processor = profile(family)
    with pytest.raises(ValueError, match="profile was made for"):
        convert(model, processor, answered(family), ConversionConfig(fold=False), profile=known)


@pytest.mark.parametrize("factorization", ["output-weighted-centered", "centered", "output-weighted"])
def test_factors_of_full_rank_reproduce_partial_rope(family, factorization):
    """Whatever the metric and the mean, nothing is lost where nothing is cut; biases included."""
    model, processor = original(family)
    whole = ConversionConfig(qk_rope_head_dim=64, d_kv=64, factorization=factorization)
    converted = convert(model, processor, answered(family), whole)
    inputs = prompt_inputs(family, processor, ["two images", "text"])
    expected, found = (whole_logits(m, inputs) for m in (model, converted))
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[keep], expected[keep], atol=1e-3, rtol=1e-3)


def test_biases_of_centred_factors_are_saved_and_loaded(family, tmp_path):
    model, processor = original(family)
    config = ConversionConfig(qk_rope_head_dim=16, d_kv=8, factorization="output-weighted-centered")
    converted = convert(model, processor, answered(family), config)
    bias = decoder_layers(converted)[0].self_attn.kv_b_proj["vision"].bias
    assert float(bias.detach().abs().max()) > 0
    save(converted, processor, tmp_path / "small")
    again, inputs = load(tmp_path / "small"), prompt_inputs(family, processor, ["image"])
    assert again.mla_config == converted.mla_config
    torch.testing.assert_close(whole_logits(again, inputs), whole_logits(converted, inputs))


def test_centring_makes_the_mean_token_exact(family):
    model, processor = original(family)
    config = ConversionConfig(qk_rope_head_dim=16, d_kv=4, factorization="centered")
    known = make_profile(model, processor, answered(family), config)
    mla = plan(model.config, config)
    source = decoder_layers(model)[1].self_attn
    selection = known.layers[1].selection(16, AttentionSizes.of(model.config), methods(config))
    exact = partial_rope_weights(source, selection)
    given = (exact, known.layers[1].stats, mla.layer(1), factorization(mla.factorization))
    found = layer_factors(*given, head_dim=source.head_dim)
    module = converted_layer(source, factored_weights(exact, found), mla.layer(1))
    for modality in ("text", "vision"):
        tokens = known.layers[1].stats.tokens[modality]
        tokens = tokens if tokens.count >= source.q_proj.in_features else known.layers[1].stats.pooled()
        mean = (tokens.total / tokens.count).float()
        wanted = exact["kv_a_proj.shared.weight"] @ mean + exact.get("kv_a_proj.shared.bias", 0.0)
        found = module.kv_b_proj[modality](module.kv_a_proj[modality](mean))
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("selection", ["rotation-kl", "mkl", "residual", "uniform"])
def test_folding_helps_every_selection(family, selection):
    model, processor = original(family)
    kl = {}
    for fold in (True, False):
        config = ConversionConfig(
            qk_rope_head_dim=32, rope_selection=selection, fold=fold, factorization="none"
        )
        kl[fold] = convert(model, processor, answered(family, 12), config).mla_config.kl["partial_rope"]
    assert kl[True] < kl[False]


def test_a_profile_of_a_method_without_ranks_has_no_losses(family):
    model, processor = original(family)
    config = ConversionConfig(qk_rope_head_dim=16, factorization="none")
    known = make_profile(model, processor, answered(family), config)
    assert known.losses == []
    own, shared = (convert(model, processor, answered(family), config, profile=p) for p in (None, known))
    assert own.mla_config == shared.mla_config


@functools.cache
def profile_of_both(family):
    model, processor = original(family)
    return make_profile(model, processor, answered(family), ConversionConfig(rotate_at="auto"))


def test_modes_of_layers_are_chosen_within_the_limit_of_arithmetic(family):
    known, (model, processor) = profile_of_both(family), original(family)
    sizes, modes, kl = AttentionSizes.of(model.config), [], []
    for limit in (0.5, 5.0, 1000.0):
        config = ConversionConfig(rotate_at="auto", max_decode_cost=limit)
        small = convert(model, processor, answered(family), config, profile=known)
        mla = small.mla_config
        assert bytes_per_token(small.config) <= 0.125 * bytes_per_token(model.config)
        assert mla.decode_cost(sizes) <= limit
        modes.append({spec.rotate_at for spec in mla.layers(sizes)})
        kl.append(sum(mla.predicted_kl))
        assert ("partial_rope" in mla.kl) == ("write" in modes[-1])
        assert mla.folded == ("write" in modes[-1])
    assert modes[0] == {"write"}
    assert "read" in modes[2]
    assert kl[0] >= kl[1] >= kl[2]


@pytest.mark.parametrize("mode", ["write", "read"])
def test_what_is_measured_for_both_modes_serves_each(family, mode):
    """Exactly: the same curves and the same weights."""
    model, processor = original(family)
    config = ConversionConfig(rotate_at="auto", budget=0.25).of(mode)
    shared, own = (
        convert(model, processor, answered(family), config, profile=known)
        for known in (profile_of_both(family), None)
    )
    assert shared.mla_config == own.mla_config
    wanted = own.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in shared.state_dict().items())


def test_what_is_measured_for_one_mode_does_not_serve_both(family):
    known, model, processor = profile(family)
    with pytest.raises(ValueError, match="profile was made for"):
        convert(model, processor, answered(family), ConversionConfig(rotate_at="auto"), profile=known)


def test_losses_fall_with_size(family):
    known, _, _ = profile(family)
    for layer in known.losses:
        assert layer.rope[14] < layer.rope[1]
        assert layer.latent[12] <= layer.latent[1]
