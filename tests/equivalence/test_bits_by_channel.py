"""Latents whose channels differ in bits: the cache holds bytes, and everything sees the same numbers."""

import pytest
import torch
from helpers import (
    answered,
    original,
    piecewise_logits,
    prompt_inputs,
    random_mla,
    set_attention,
    whole_logits,
)

from mha2mla_vlm import load
from mha2mla_vlm.config import AttentionSizes, MLAConfig
from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.pipeline import convert
from mha2mla_vlm.data.records import encode_with_labels
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.cache.latent import LatentCache, bytes_per_token, cache_bytes
from mha2mla_vlm.model.checkpoint import save
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.model.shipped import ZOO_NAMES

BITS = (4, 12, 8, 8)
NORMED = "qwen3_vl"
CLOSE = {"atol": 1e-5, "rtol": 1e-4}  # softmax is in float32; a number that falls in another step shows
BATCH = ["image", "text", "two images"]


@pytest.fixture(params=["llava", "qwen2_5_vl", NORMED])
def family(request):
    """One family with one axis of positions and one with three, and one with normed keys."""
    return request.param


@pytest.fixture(params=["write", "read"])
def mode(request):
    return request.param


def doubled(family, mode, **options):
    """In float64, where no rounding error moves a number over the edge of a step."""
    model, processor = random_mla(family, rotate_at=mode, bits=BITS, **options)
    return model.double(), processor


@pytest.mark.parametrize("limit", [0, 10**6], ids=["expanded", "absorbed"])
def test_the_cache_gives_the_logits_of_the_whole_model_in_the_bytes_of_the_bits(family, mode, limit):
    model, processor = doubled(family, mode)
    inputs = prompt_inputs(family, processor, ["two images"])
    expected, cache, total = whole_logits(model, inputs), LatentCache(), inputs["input_ids"].shape[1]
    got = piecewise_logits(set_attention(model, absorb_limit=limit), inputs, [total - 5, total - 1], cache)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert cache.layers[0].keys.dtype == torch.uint8
    assert cache_bytes(cache) == total * bytes_per_token(model.config, itemsize=8)
    sizes = AttentionSizes.of(model.config)
    row = 4 * 2 + 12 + 8 // 2 + 8 // 4 + (0 if mode == "read" else sizes.kv_heads * 16)
    assert bytes_per_token(model.config) == 4 * row + model.mla_config.position_bytes(sizes)


def test_what_is_rounded_counts(family, mode):
    """Negative control: the same weights without bits give other logits."""
    model, processor = doubled(family, mode)
    inputs = prompt_inputs(family, processor, ["image"])
    expected = whole_logits(model, inputs)
    set_attention(model, bits=None)
    assert (whole_logits(model, inputs) - expected).abs().max() > 1e-2


def test_batches_beams_and_static_caches(family, mode):
    model, processor = doubled(family, mode)
    inputs = prompt_inputs(family, processor, BATCH)
    options = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    together = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    alone = prompt_inputs(family, processor, BATCH[:1])
    got = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
    assert got.tolist() == together[0].tolist()
    static = {"cache_implementation": "static", "disable_compile": True}
    assert model.generate(**inputs, **options, **static)[:, -6:].tolist() == together.tolist()
    beams = model.generate(**inputs, **options, num_beams=3)
    assert model.generate(**inputs, **options, **static, num_beams=3).tolist() == beams.tolist()
    looked_up = prompt_inputs(family, processor, ["text"])
    expected = model.generate(**looked_up, **options)
    assert model.generate(**looked_up, **options, prompt_lookup_num_tokens=3).tolist() == expected.tolist()


def test_saved_is_loaded(family, mode, tmp_path):
    model, processor = doubled(family, mode)
    inputs = prompt_inputs(family, processor, ["image"])
    again = load(save(model, processor, tmp_path / "model"), dtype=torch.float64)
    torch.testing.assert_close(whole_logits(again, inputs), whole_logits(model, inputs), **CLOSE)
    mla = MLAConfig.from_dict(again.config.mla)
    assert [tuple(each) for each in mla.latent_bits] == [BITS] * 4


def test_caches_that_quantise_themselves_take_numbers(family, mode):
    model, processor = random_mla(family, rotate_at=mode, bits=BITS)
    inputs = prompt_inputs(family, processor, ["image"])
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "quantized"}
    out = model.generate(
        **inputs, **options, cache_config={"nbits": 8, "residual_length": 64}, return_dict_in_generate=True
    )
    assert out.past_key_values.layers[0].keys.dtype == torch.float32


def test_what_is_trained_is_what_is_kept(family, mode):
    model, processor = random_mla(family, rotate_at=mode, bits=BITS)
    visual = get_family(family).visual_token_ids(model.config)
    inputs = encode_with_labels(processor, answered(family, 1), visual)
    model.train()
    model(**inputs).loss.backward()
    down = decoder_layers(model)[0].self_attn.kv_a_proj["text"]
    assert down.weight.grad.abs().max() > 0
    assert down.bias.grad.abs().max() > 0


def test_a_model_is_converted_to_it(family, mode):
    model, processor = original(family)
    if family == NORMED and mode == "write":
        with pytest.raises(InputError, match="give --rotate-at read"):
            convert(model, processor, answered(family), ConversionConfig(rotate_at=mode, latent_bits="mixed"))
        mode = "auto"  # which knows that only read is possible
    config = ConversionConfig(rotate_at=mode, budget=0.2, latent_bits="mixed")
    small = convert(model, processor, answered(family), config)
    assert bytes_per_token(small.config) <= 0.2 * bytes_per_token(model.config)
    specs = small.mla_config.layers(AttentionSizes.of(model.config))
    assert all(spec.bits.rank == spec.rank for spec in specs)
    assert small.mla_config.kl["factorization"] < 1
    for layer, spec in zip(decoder_layers(small), specs, strict=True):
        kept = layer.self_attn.kv_a_proj["vision"]
        assert kept.out_features == spec.rank
        assert kept.bias is not None


@pytest.mark.parametrize("family", ZOO_NAMES)
def test_modes_and_bits_are_chosen_together(family):
    model, processor = original(family)
    config = ConversionConfig(rotate_at="auto", budget=0.2, latent_bits="mixed", max_decode_cost=9)
    small = convert(model, processor, answered(family), config)
    sizes = AttentionSizes.of(model.config)
    assert small.mla_config.decode_cost(sizes) <= 9
    assert bytes_per_token(small.config) <= 0.2 * bytes_per_token(model.config)


def test_what_does_not_go_with_it_is_refused(family):
    with pytest.raises(InputError, match="latent_bits '8': give 16, mixed or auto"):
        ConversionConfig(latent_bits="8")
    with pytest.raises(InputError, match="give one instead of d_kv"):
        ConversionConfig(latent_bits="mixed", d_kv=8)
    sizes = AttentionSizes.of(original(family)[0].config)
    with pytest.raises(InputError, match="give how many channels have 16, 8, 4 and 2 bits"):
        MLAConfig(qk_rope_head_dim=16, kv_lora_rank=8, latent_bits=[[8]] * 4)
    for wrong in ([0, 5, 3, 0], [0, 6, 0, 2], [1, 6, 2, 0], [-1, 9, 0, 0]):
        with pytest.raises(InputError, match="kv_lora_rank 8"):
            MLAConfig(qk_rope_head_dim=16, kv_lora_rank=8, latent_bits=[wrong] * 4).check(sizes)
