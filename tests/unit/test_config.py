"""Configurations: what is refused, with which words, and that nothing is lost on the way to JSON."""

import copy
import dataclasses
import functools
import json
import math

import pytest
import torch

from mha2mla_vlm.algorithms.factorization import FACTORIZATIONS
from mha2mla_vlm.algorithms.factorization import factorization as find_factorization
from mha2mla_vlm.algorithms.factorization.blocks import block_factors
from mha2mla_vlm.algorithms.pair_selection import PAIR_SELECTIONS
from mha2mla_vlm.config import (
    DECOUPLED,
    SHARED,
    AttentionSizes,
    LayerSpec,
    MLAConfig,
)
from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.plan import plan
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.modeling import mla_classes
from mha2mla_vlm.model.shipped import ZOO_NAMES
from mha2mla_vlm.zoo.architectures import new_model

SIZES = AttentionSizes(layers=3, heads=4, kv_heads=2, head_dim=64, hidden=256)


@functools.cache
def known_config(name):
    return new_model(name)[0].config


def config_of(name):
    return copy.deepcopy(known_config(name))


def refused(action, *words):
    """Run `action`, which must raise `InputError` with one line that holds all `words`."""
    with pytest.raises(InputError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    assert [word for word in words if str(word) not in message] == []


@pytest.mark.parametrize("kind", [MLAConfig, ConversionConfig])
def test_unknown_keys_are_refused_with_the_known_ones(kind):
    known = [field.name for field in dataclasses.fields(kind)]
    values = {"qk_rope_head_dim": 8} if kind is MLAConfig else {}
    refused(lambda: kind.from_dict(values | {"rank": 3, "colour": 1}), "colour, rank", kind.__name__, *known)


@pytest.mark.parametrize("kind", [MLAConfig, ConversionConfig])
def test_configs_are_frozen_and_keyword_only(kind):
    config = kind(qk_rope_head_dim=8) if kind is MLAConfig else kind()
    name = dataclasses.fields(kind)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, 4)
    with pytest.raises(TypeError):
        kind(8)


@pytest.mark.parametrize(
    "config",
    [
        MLAConfig(qk_rope_head_dim=8),
        MLAConfig(
            qk_rope_head_dim=[8, 16],
            kv_lora_rank=[4, 32],
            modalities=DECOUPLED,
            rope_selection="mkl",
            factorization="md-svd",
            folded=True,
            kv_bias=True,
            kl={"partial_rope": 0.25, "factorization": 0.5},
            predicted_kl=[0.5, 0.25],
        ),
        ConversionConfig(),
        ConversionConfig(qk_rope_head_dim=16, d_kv=8, rope_selection="low", factorization="split", samples=9),
        ConversionConfig(budget=0.25, fold=False),
    ],
    ids=["mla", "mla by layer", "default", "given", "budget"],
)
def test_a_config_survives_json(config):
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.to_dict() == config.to_dict()


def test_one_number_holds_for_all_layers_and_a_list_for_each():
    one = MLAConfig(qk_rope_head_dim=8, kv_lora_rank=4)
    each = MLAConfig(qk_rope_head_dim=[8, 2, 4], kv_lora_rank=[4, 6, 8])
    assert [one.layer(i) for i in range(3)] == [LayerSpec(rope_dim=8, rank=4)] * 3
    assert each.layers(SIZES) == [LayerSpec(rope_dim=r, rank=c) for r, c in ((8, 4), (2, 6), (4, 8))]
    whole = LayerSpec(rope_dim=8, modalities=DECOUPLED, bias=True)
    assert MLAConfig(qk_rope_head_dim=8, modalities=DECOUPLED, kv_bias=True).layer(1) == whole


def test_a_layer_left_as_it_was_is_nothing_in_the_list():
    one = MLAConfig(qk_rope_head_dim=[None, 8, None], kv_lora_rank=4)
    each = MLAConfig.from_dict({"qk_rope_head_dim": [None, 8, None], "kv_lora_rank": [None, 4, None]})
    for config in (one, each):
        config.check(SIZES)
        assert config.layers(SIZES) == [None, LayerSpec(rope_dim=8, rank=4), None]
        assert config.token_bytes(SIZES, 1) == 2 * SIZES.numbers_per_token + SIZES.kv_heads * 8 + 4
        assert MLAConfig.from_dict(config.to_dict()) == config
    for ranks in ([None, None, None], [4, 4, None]):
        wrong = dataclasses.replace(each, kv_lora_rank=ranks)
        refused(lambda: wrong.check(SIZES), "give both, or null twice")  # noqa: B023
    refused(lambda: MLAConfig(qk_rope_head_dim=[None] * 3).check(SIZES), "leaves all layers")


@pytest.mark.parametrize("modalities", [(), ("vision",), ("vision", "text"), ("text", "vision", "audio")])
def test_unknown_modalities_are_refused_with_the_known_ones(modalities):
    refused(lambda: MLAConfig(qk_rope_head_dim=8, modalities=modalities), str(modalities), SHARED, DECOUPLED)


@pytest.mark.parametrize("rope", [1, 7, 63, 0, -2, 66, 128])
def test_rope_dims_that_a_head_cannot_have_are_refused(rope):
    words = (f"R = {rope}:", "even number", "2 to the head dim 64")
    refused(lambda: MLAConfig(qk_rope_head_dim=rope).check(SIZES), *words)
    refused(lambda: MLAConfig(qk_rope_head_dim=[32, 32, rope]).check(SIZES), *words)


@pytest.mark.parametrize("rope", [2, 32, 64])
@pytest.mark.parametrize("rank", [None, 1, 128])
def test_sizes_that_a_model_can_have_are_accepted(rope, rank):
    MLAConfig(qk_rope_head_dim=rope, kv_lora_rank=rank).check(SIZES)
    MLAConfig(qk_rope_head_dim=[rope] * 3, kv_lora_rank=None if rank is None else [rank] * 3).check(SIZES)


def test_a_rank_larger_than_keys_and_values_is_refused():
    MLAConfig(qk_rope_head_dim=32, kv_lora_rank=192).check(SIZES)  # 2 KV heads of 32 key and 64 value dims
    for rank in (193, 0, -1):
        config = MLAConfig(qk_rope_head_dim=32, kv_lora_rank=rank)
        refused(lambda: config.check(SIZES), f"kv_lora_rank {rank}", "1 to 192", "R = 32")  # noqa: B023


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_a_plan_of_a_rank_larger_than_the_input_is_refused(name):
    """But for a block kept whole, which is in the rank."""
    config = config_of(name)
    text = config.get_text_config(decoder=True)
    text.hidden_size, text.head_dim = hidden, _ = 90 * text.num_key_value_heads, 64
    given = {"qk_rope_head_dim": 32}
    plan(config, ConversionConfig(**given, d_kv=90))
    words = (f"1 to {hidden}", "d_kv up to 90")
    refused(lambda: plan(config, ConversionConfig(**given, d_kv=91)), *words)
    assert plan(config, ConversionConfig(**given, d_kv=31, factorization="only-key")).kv_lora_rank > hidden
    refused(lambda: plan(config, ConversionConfig(**given, d_kv=33, factorization="only-key")), "only-key")


@pytest.mark.parametrize("name", ["qk_rope_head_dim", "kv_lora_rank"])
@pytest.mark.parametrize("length", [0, 2, 4])
def test_lists_of_the_wrong_length_are_refused(name, length):
    config = MLAConfig(**{"qk_rope_head_dim": 32, "kv_lora_rank": 8} | {name: [8] * length})
    refused(lambda: config.check(SIZES), name, f"lists {length} layers", "model has 3")


@pytest.mark.parametrize(
    ("field", "known"), [("rope_selection", PAIR_SELECTIONS), ("factorization", FACTORIZATIONS)]
)
@pytest.mark.parametrize("value", ["best", "MD-SVD", ""])
def test_unknown_methods_are_refused_with_the_known_ones(field, known, value):
    refused(lambda: ConversionConfig(**{field: value}), repr(value), field.replace("_", " "), *known)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"samples": 1}, ["samples = 1", "at least 2"]),
        ({"samples": -5}, ["samples = -5"]),
        ({"held_out": 0}, ["held_out = 0", "between 0 and 1"]),
        ({"held_out": 1.0}, ["held_out = 1.0"]),
        ({"held_out": -0.1}, ["held_out = -0.1"]),
        ({"factorization": "none", "d_kv": 8}, ["d_kv = 8", "'none'"]),
        ({"budget": 0}, ["budget = 0", "up to 1"]),
        ({"budget": 1.5}, ["budget = 1.5"]),
        (
            {"budget": 0.5, "qk_rope_head_dim": 32, "d_kv": 16},
            ["budget, qk_rope_head_dim and d_kv", "leave one"],
        ),
        ({"budget": 0.5, "d_kv": 16, "rotate_at": "read"}, ["budget and d_kv", "at read"]),
        ({"rotate_at": "auto", "qk_rope_head_dim": 32}, ["auto chooses qk_rope_head_dim", "give a budget"]),
        ({"rotate_at": "auto", "d_kv": 16}, ["auto chooses d_kv", "give a budget"]),
        ({"rotate_at": "auto", "factorization": "split"}, ["'split'", "rotate_at auto"]),
        ({"rotate_at": "auto", "max_decode_cost": 0.0}, ["max_decode_cost = 0.0", "above 0"]),
        ({"rotate_at": "auto", "max_decode_cost": math.inf}, ["max_decode_cost = inf"]),
        ({"rotate_at": "auto", "max_decode_cost": math.nan}, ["max_decode_cost = nan"]),
        ({"max_decode_cost": 40.0, "rotate_at": "write"}, ["max_decode_cost", "not with write"]),
        ({"max_decode_cost": 40.0, "rotate_at": "read"}, ["max_decode_cost", "not with read"]),
        ({"rotate_at": "both"}, ["rotate_at 'both'", "write, read or auto"]),
        ({"budget": 0.5, "factorization": "none"}, ["'none'", "no ranks to allocate"]),
        ({"budget": 0.5, "factorization": "split"}, ["'split'", "qk_rope_head_dim and d_kv instead"]),
    ],
)
def test_conversions_that_make_no_sense_are_refused(values, words):
    refused(lambda: ConversionConfig(**values), *words)


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_the_default_plan_at_write_halves_rope_and_quarters_the_latent(name):
    text = config_of(name).get_text_config(decoder=True)
    mla = plan(config_of(name), ConversionConfig(rotate_at="write"))
    assert mla.qk_rope_head_dim == 32  # D = 64
    assert mla.kv_lora_rank == 16 * text.num_key_value_heads
    assert mla.modalities == DECOUPLED
    elements = text.num_key_value_heads * mla.qk_rope_head_dim + mla.kv_lora_rank
    assert elements / (2 * text.num_key_value_heads * 64) == 0.375


@pytest.mark.parametrize("name", ZOO_NAMES)
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"qk_rope_head_dim": 31}, ["R = 31", "head dim 64"]),
        ({"qk_rope_head_dim": 0}, ["R = 0", "head dim 64"]),
        ({"qk_rope_head_dim": 66}, ["R = 66", "head dim 64"]),
        ({"d_kv": 0}, ["kv_lora_rank 0"]),
        ({"d_kv": -4}, ["kv_lora_rank -"]),
        ({"d_kv": 4000}, ["kv_lora_rank", "d_kv up to"]),
    ],
)
def test_a_plan_that_the_model_cannot_have_is_refused(name, values, words):
    refused(lambda: plan(config_of(name), ConversionConfig(**values)), *words)


@pytest.mark.parametrize("name", ZOO_NAMES)
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"budget": 0.03, "rotate_at": "write"}, ["budget = 0.03", "least for these sizes is 0.03125"]),
        (
            {"budget": 0.05, "rotate_at": "write", "latent_bits": "16"},
            ["budget = 0.05", "least for these sizes is 0.0625"],
        ),
        ({"budget": 0.25, "qk_rope_head_dim": 32, "latent_bits": "16"}, ["budget = 0.25", "0.28125"]),
        ({"budget": 0.5, "qk_rope_head_dim": 30}, ["qk_rope_head_dim = 30", "multiple of 4"]),
        ({"budget": 0.5, "d_kv": 9}, ["d_kv = 9", "multiple of 4"]),
        ({"rotate_at": "auto", "budget": 0.01}, ["budget = 0.01", "least for these sizes is 0.015625"]),
        ({"rotate_at": "auto", "max_decode_cost": 0.01}, ["max_decode_cost = 0.01", "0.125 of the cache"]),
    ],
)
def test_a_budget_that_holds_too_little_is_refused(name, values, words):
    refused(lambda: plan(config_of(name), ConversionConfig(**values)), *words)


def test_sizes_that_are_given_win_over_the_default_budget():
    assert ConversionConfig(rotate_at="write").share == 0.375
    assert ConversionConfig(budget=0.2).share == 0.2
    assert ConversionConfig(qk_rope_head_dim=32).share is None
    assert ConversionConfig(d_kv=32).share is None
    assert ConversionConfig(budget=0.2, d_kv=8).share == 0.2
    assert ConversionConfig().share == ConversionConfig().of("write").share == 0.125
    assert ConversionConfig(factorization="split").share is None


@pytest.mark.parametrize(
    ("values", "mode"),
    [
        ({}, "auto"),
        ({"budget": 0.3, "factorization": "centered", "latent_bits": "mixed"}, "auto"),
        ({"qk_rope_head_dim": 32}, "write"),
        ({"d_kv": 8}, "write"),
        ({"rope_selection": "mkl"}, "write"),
        ({"fold": False}, "write"),
        ({"factorization": "split"}, "write"),
        ({"qk_rope_head_dim": 32, "rotate_at": "read"}, "read"),
    ],
)
def test_what_only_goes_with_write_makes_it_the_default(values, mode):
    assert ConversionConfig(**values).rotate_at == mode


@pytest.mark.parametrize("name", ZOO_NAMES)
@pytest.mark.parametrize(("factorization", "whole"), [("only-key", 64), ("only-value", 32), ("split", 0)])
def test_d_kv_is_the_rank_of_what_is_factorised(name, factorization, whole):
    kv_heads = config_of(name).get_text_config(decoder=True).num_key_value_heads
    mla = plan(config_of(name), ConversionConfig(factorization=factorization, d_kv=8, qk_rope_head_dim=32))
    assert mla.kv_lora_rank == kv_heads * (8 + whole)
    assert mla.modalities == SHARED


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_without_factorisation_there_is_no_rank(name):
    assert plan(config_of(name), ConversionConfig(factorization="none")).kv_lora_rank is None


@pytest.mark.parametrize("name", ZOO_NAMES)
@pytest.mark.parametrize(
    ("factorization", "rope_dim", "d_kv"),
    [("split", 64, 16), ("split", 48, 40), ("only-key", 32, 0), ("only-key", 32, -1), ("only-value", 32, 0)],
)
def test_every_planned_rank_can_be_made_of_blocks(name, factorization, rope_dim, d_kv):
    """A rank that keys or values alone cannot have is either refused or shared out otherwise."""
    text = config_of(name).get_text_config(decoder=True)
    try:
        config = ConversionConfig(factorization=factorization, qk_rope_head_dim=rope_dim, d_kv=d_kv)
        rank = plan(config_of(name), config).kv_lora_rank
    except InputError:
        return
    outputs = text.num_key_value_heads * (128 - rope_dim)
    is_key = torch.arange(outputs) % (128 - rope_dim) < 64 - rope_dim
    factors = block_factors(
        torch.randn(outputs, text.hidden_size), is_key, rank, find_factorization(factorization).whole
    )
    assert factors.down.shape[0] == factors.up.shape[1] == rank


@pytest.mark.parametrize("name", ZOO_NAMES)
@pytest.mark.parametrize(
    "mla", [{}, {"qk_rope_head_dim": [8]}, {"qk_rope_head_dim": 7}, {"qk_rope_head_dim": 128}]
)
def test_a_model_is_not_built_of_a_config_that_it_cannot_have(name, mla):
    config_class, model_class = mla_classes(name)
    values = config_of(name).to_dict() | {"model_type": config_class.model_type, "mla": mla}
    with torch.device("meta"), pytest.raises(InputError):
        model_class(config_class(**values))
