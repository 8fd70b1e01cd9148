"""What only Gemma 4 has: keys that are values, capped logits, heads by kind of layer, layers that share."""

import pytest
import torch
from helpers import answered, original, prompt_inputs, random_mla, with_positions

from mha2mla_vlm.calibration.activations import layer_arguments
from mha2mla_vlm.config import AttentionSizes
from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.pipeline import convert
from mha2mla_vlm.conversion.plan import plan
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.cache.latent import bytes_per_token
from mha2mla_vlm.model.cache.state import state_bytes_per_row
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.model.normed import key_scale, keys_and_values
from mha2mla_vlm.model.offload import logits_of


def test_half_of_the_cache_is_exact_where_keys_are_values():
    model, processor = original("gemma4")
    sizes = AttentionSizes.of(model.config)
    small = convert(
        model, processor, answered("gemma4", 3), ConversionConfig(d_kv=sizes.head_dim, rotate_at="read")
    )
    assert small.mla_config.kl["factorization"] < 1e-6
    latents = bytes_per_token(small.config) - small.mla_config.position_bytes(sizes)
    assert 2 * latents == bytes_per_token(model.config)
    with pytest.raises(InputError, match=f"give 1 to {sizes.head_dim}, that is d_kv up to {sizes.head_dim} "):
        plan(model.config, ConversionConfig(d_kv=sizes.head_dim + 1, rotate_at="read"))


def test_a_key_is_its_value_scaled():
    model, _ = original("gemma4")
    attention = decoder_layers(model)[1].self_attn
    keys, values = keys_and_values(attention, torch.randn(1, 5, 64))
    torch.testing.assert_close(values * key_scale(attention), keys)
    assert not hasattr(decoder_layers(random_mla("gemma4", rope_dim=8)[0])[1].self_attn, "k_norm")
    assert key_scale(decoder_layers(original("gemma4-moe")[0])[1].self_attn) is None


def test_sizes_are_those_of_each_kind_of_layer():
    model, _ = original("gemma4")
    text = model.config.text_config
    windows, whole = AttentionSizes.of_text(text, 0), AttentionSizes.of(model.config)
    assert (windows.kv_heads, windows.head_dim, windows.rotary_dim) == (2, 16, 16)
    assert (whole.kv_heads, whole.head_dim, whole.rotary_dim, whole.pair_stride) == (1, 32, 8, 16)
    assert bytes_per_token(model.config) == 2 * 2 * 32 * 2
    assert state_bytes_per_row(model.config) == 2 * 8 * 2 * 2 * 16 * 2  # of windows of 8 tokens


def test_logits_are_capped_where_they_are_compared():
    model, processor = original("gemma4")
    inputs = with_positions(model, prompt_inputs("gemma4", processor, ["image"]))
    with torch.no_grad():
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        expected = model(**inputs, use_cache=False).logits
        torch.testing.assert_close(logits_of(model, hidden), expected)
        assert (model.lm_head(hidden) - expected).abs().max() > 0.1


def test_calibration_keeps_no_keys_and_values_for_other_layers():
    model, processor = original("gemma4-moe")
    inputs = prompt_inputs("gemma4-moe", processor, ["image"])
    hidden, given, _ = layer_arguments(model, inputs)
    with torch.no_grad():
        for layer, own in zip(decoder_layers(model), given, strict=True):
            assert own["per_layer_input"].shape == (1, hidden.shape[1], 8)
            hidden = layer(hidden, **own)
            assert not own["shared_kv_states"]
        expected = model.model(**inputs, use_cache=False).last_hidden_state
        torch.testing.assert_close(model.model.language_model.norm(hidden), expected)


def test_its_drafters_are_refused():
    model, processor = random_mla("gemma4", rope_dim=8)
    inputs = prompt_inputs("gemma4", processor, ["text"])
    with pytest.raises(InputError, match="drafters read keys and values"):
        model(**inputs, return_shared_kv_states=True)  # as `generate` does for them


def test_layers_that_share_keys_and_values_are_refused():
    model, processor = original("gemma4")
    model.config.text_config.num_kv_shared_layers = 2
    with pytest.raises(InputError, match=r"num_kv_shared_layers = 2: .* supported is 0, as Gemma 4 12B"):
        convert(model, processor, answered("gemma4", 3), ConversionConfig())
