"""Converted models some of whose layers are left as the original has them."""

import pytest
import torch
from helpers import (
    answered,
    greedy,
    original,
    piecewise_logits,
    prompt_inputs,
    real_tokens,
    set_attention,
    whole_logits,
)
from transformers import DynamicCache, StaticCache

from mha2mla_vlm import load
from mha2mla_vlm.config import AttentionSizes
from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.describe import describe, layers_table
from mha2mla_vlm.conversion.pipeline import convert
from mha2mla_vlm.model.attention import MLAAttention
from mha2mla_vlm.model.cache.latent import LatentCache, bytes_per_token, cache_bytes
from mha2mla_vlm.model.cache.quantized import QuantizationConfig, quantized_bytes_per_token, quantized_cache
from mha2mla_vlm.model.card import model_card
from mha2mla_vlm.model.checkpoint import save
from mha2mla_vlm.model.modeling import decoder_layers, mla_classes
from mha2mla_vlm.utils.compat import cache_argument, cache_of

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
LEFT = [0, 2]


@pytest.fixture(scope="module")
def models():
    """Per family, an original, and a converted model of full rank with the layers `LEFT` as they were."""
    made = {}

    def make(family):
        if family not in made:
            model, processor = original(family)
            records = answered(family, 3, ["two images"])
            whole = convert(model, processor, records, ConversionConfig(qk_rope_head_dim=64, d_kv=64))
            made[family] = model, with_left(model, whole), processor
        return made[family]

    return make


def with_left(model, converted):
    """The converted model with the layers `LEFT` of the original."""
    mla = dict(converted.config.mla)
    layers = range(len(decoder_layers(model)))
    for name in ("qk_rope_head_dim", "kv_lora_rank"):
        mla[name] = [None if index in LEFT else mla[name] for index in layers]
    config_class, model_class = mla_classes(model.config.model_type)
    config = config_class(**converted.config.to_dict() | {"mla": mla})
    places = tuple(f"model.language_model.layers.{index}.self_attn." for index in LEFT)
    state = {k: v for k, v in converted.state_dict().items() if not k.startswith(places)}
    state |= {k: v for k, v in model.state_dict().items() if k.startswith(places)}
    made = model_class.from_pretrained(None, config=config, state_dict=state, dtype=model.dtype)
    made.generation_config = converted.generation_config
    return made.eval()


def attention_kinds(model):
    return [isinstance(layer.self_attn, MLAAttention) for layer in decoder_layers(model)]


@pytest.mark.parametrize("prompts", [["image"], ["image", "text", "two images"]], ids=str)
def test_logits_are_those_of_the_original(models, family, prompts):
    model, mixed, processor = models(family)
    assert attention_kinds(mixed) == [index not in LEFT for index in range(4)]
    inputs = prompt_inputs(family, processor, prompts)
    expected = real_tokens(whole_logits(model, inputs), inputs)
    torch.testing.assert_close(real_tokens(whole_logits(mixed, inputs), inputs), expected, **CLOSE)


@pytest.mark.parametrize("limit", [0, 10**6], ids=["expanded", "absorbed"])
@pytest.mark.parametrize("cache", [LatentCache, DynamicCache])
def test_cached_is_uncached(models, family, cache, limit):
    _, mixed, processor = models(family)
    inputs = prompt_inputs(family, processor, ["two images"])
    expected, held = whole_logits(mixed, inputs), cache()
    set_attention(mixed, absorb_limit=limit)
    total = inputs["input_ids"].shape[1]
    got = piecewise_logits(mixed, inputs, list(range(total - 3, total)), held)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert cache_bytes(held) == total * bytes_per_token(mixed.config, itemsize=4)
    modality = [getattr(layer, "token_modality", None) for layer in held.layers]
    assert [known is not None for known in modality] == [False, True, False, False]


@pytest.mark.parametrize("how", ["dynamic", "static", "StaticCache", "beams"])
def test_generated_tokens_are_those_of_the_original(models, family, how):
    model, mixed, processor = models(family)
    inputs = prompt_inputs(family, processor, ["image", "two images"])
    options = greedy(mixed, 5, **({"num_beams": 2} if how == "beams" else {}))
    expected = model.generate(**inputs, **options)
    if how == "StaticCache":
        options |= cache_argument(StaticCache(mixed.config.get_text_config(), max_cache_len=256))
    elif how != "beams":
        options["cache_implementation"] = how
    assert torch.equal(mixed.generate(**inputs, **options), expected)


def test_a_quantised_cache_leaves_keys_and_values_as_they_are(models, family):
    _, mixed, processor = models(family)
    inputs = prompt_inputs(family, processor, ["two images"])
    total = inputs["input_ids"].shape[1]
    cuts, expected = list(range(total - 3, total)), whole_logits(mixed, inputs)
    cache = quantized_cache(nbits=8, q_group_size=1, residual_length=1)
    got = piecewise_logits(mixed, inputs, cuts, cache)
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()
    formula = quantized_bytes_per_token(
        mixed.config, QuantizationConfig(nbits=8, q_group_size=1, residual_length=1), itemsize=4
    )
    assert cache_bytes(cache) == total * formula
    config = {"nbits": 8, "q_group_size": 16, "residual_length": 16}
    output = mixed.generate(
        **inputs, max_new_tokens=3, cache_implementation="quantized", cache_config=config,
        return_dict_in_generate=True,
    )  # fmt: skip
    kinds = [hasattr(layer, "numbers") for layer in cache_of(output).layers]
    assert kinds == [index not in LEFT for index in range(4)]


def test_saved_is_loaded_and_described(models, family, tmp_path):
    model, mixed, processor = models(family)
    save(mixed, processor, tmp_path / "mixed")
    again = load(tmp_path / "mixed", dtype="float32")
    assert attention_kinds(again) == attention_kinds(mixed)
    inputs = prompt_inputs(family, processor, ["image"])
    assert torch.equal(whole_logits(again, inputs), whole_logits(mixed, inputs))
    found, sizes = describe(str(tmp_path / "mixed")), AttentionSizes.of(model.config)
    assert [rope is None for rope in found["qk_rope_head_dim"]] == [index in LEFT for index in range(4)]
    assert [len(heads) for heads in found["pairs"]] == [0, sizes.kv_heads, 0, sizes.kv_heads]
    own, latent = 2 * sizes.kv_heads * 64, sizes.kv_heads * 64 + mixed.mla_config.layer(1).rank
    assert found["bytes_per_token"] == 2 * 2 * (own + latent)
    assert list(layers_table(found).columns[1].cells).count("as it was") == len(LEFT)
    assert "None, 64, None, 64" in str(model_card(mixed.config, name="mixed"))


def test_it_trains(models, family):
    _, mixed, processor = models(family)
    inputs = prompt_inputs(family, processor, ["image"])
    mixed.train()
    try:
        mixed(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    finally:
        mixed.eval()
    parameters = [p for layer in decoder_layers(mixed) for p in layer.self_attn.parameters()]
    assert all(parameter.grad is not None for parameter in parameters)
