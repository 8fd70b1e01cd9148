"""Quantisation, and a layer that keeps blocks of quantised tokens."""

import pytest
import torch
from helpers import random_mla

from mha2mla_vlm.config import AttentionSizes
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.cache.latent import cache_bytes
from mha2mla_vlm.model.cache.quantization import BITS, dequantize, quantize
from mha2mla_vlm.model.cache.quantized import QuantizationConfig, quantized_bytes_per_token, quantized_cache


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("channels", [1, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_half_a_step(bits, channels, dtype):
    x = normal(2, 3, 16, channels, dtype=dtype) * 10.0 ** (torch.arange(channels) - 2.0).clamp_max(3).to(
        dtype
    )
    found = quantize(x, bits, 8)
    assert found.codes.dtype == torch.uint8
    assert found.codes.shape[-1] == -(-channels * bits // 8)
    blocks = x.float().unflatten(2, (-1, 8))
    step = (blocks.amax(3) - blocks.amin(3)) / (2**bits - 1)
    error = (dequantize(found, torch.float32) - x.float()).unflatten(2, (-1, 8)).abs().amax(3)
    rounding = 0 if dtype == torch.float32 else 2e-3 * blocks.abs().amax(3) + 3e-5  # float16 ranges
    assert (error <= 0.51 * step + rounding).all()


def test_constant_channels_come_back():
    x = torch.full((1, 1, 8, 3), 2.5)
    torch.testing.assert_close(dequantize(quantize(x, 2, 8), torch.float32), x)


def filled(length, *, piece=1, first=None, **config):
    """A cache layer, the numbers that it was given, and what it hands out after the last of them."""
    latent, rope = normal(2, 1, length, 6), normal(2, 3, length, 4, seed=1)
    cache = quantized_cache(q_group_size=8, residual_length=16, **config)
    start, stop = 0, first or piece
    while start < length:
        given = cache.update(latent[:, :, start:stop], rope[:, :, start:stop], 0)
        start, stop = stop, min(stop + piece, length)
    return cache, latent, rope, given


@pytest.mark.parametrize("first", [1, 7, 8, 30])
@pytest.mark.parametrize("piece", [1, 5])
def test_tokens_come_back_in_order_and_the_last_ones_exactly(first, piece):
    cache, latent, rope, (pieces, _) = filled(50, first=first, piece=piece, nbits=8)
    layer = cache.layers[0]
    assert cache.get_seq_length() == pieces.length == 50
    assert layer.quantized_length % 8 == 0
    assert 50 - layer.quantized_length < 16
    got_latent, got_rope = pieces.whole()
    torch.testing.assert_close(got_latent, latent[:, 0], atol=0.02, rtol=0)
    torch.testing.assert_close(got_rope, rope, atol=0.02, rtol=0)
    recent = slice(layer.quantized_length, None)
    assert torch.equal(got_latent[:, recent], latent[:, 0, recent])
    assert torch.equal(got_rope[:, :, recent], rope[:, :, recent])


@pytest.mark.parametrize(("bits", "rope_bits"), [(8, 8), (4, 4), (2, 4), (4, 16)])
def test_bytes_are_those_of_the_codes_and_ranges(bits, rope_bits):
    cache, *_ = filled(50, first=50, nbits=bits, rope_nbits=rope_bits)
    codes = 2 * 48 * (6 * bits // 8 if bits != 2 else 2)  # 6 channels in 2 bits take 2 bytes
    keys = 2 * 48 * 3 * 4 * rope_bits // 8 if rope_bits != 16 else 2 * 48 * 3 * 4 * 4
    ranges = 2 * 6 * 2 * 6 * 4 + (2 * 6 * 2 * 3 * 4 * 4 if rope_bits != 16 else 0)  # float32, low and step
    recent = 2 * 2 * (6 + 3 * 4) * 4
    assert cache_bytes(cache) == codes + keys + ranges + recent


@pytest.mark.parametrize("kept", [50, 49, 48, 47, 41, 40, 17, 8, 5])
def test_crop(kept):
    cache, latent, rope, _ = filled(50, first=50, nbits=8)
    cache.crop(kept - 50)
    assert cache.get_seq_length() == kept
    pieces, _ = cache.update(latent[:, :, kept:], rope[:, :, kept:], 0)
    if kept < 50:
        torch.testing.assert_close(pieces.whole()[0], latent[:, 0], atol=0.02, rtol=0)
        torch.testing.assert_close(pieces.whole()[1], rope, atol=0.02, rtol=0)


def test_rows_are_selected_and_repeated():
    cache, latent, *_ = filled(50, first=50, nbits=8)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    pieces, _ = cache.update(normal(2, 1, 1, 6), normal(2, 3, 1, 4), 0)
    torch.testing.assert_close(pieces.whole()[0][:, :50], latent[[1, 0], 0], atol=0.02, rtol=0)


def test_reset_forgets():
    cache, *_ = filled(50, first=50)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache_bytes(cache) == 0


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"nbits": 3}, "nbits is 3"),
        ({"rope_nbits": 5}, "rope_nbits is 5"),
        ({"q_group_size": 0}, "residual_length"),
        ({"residual_length": 32}, "residual_length 32"),
        ({"bits": 4}, "unknown key"),
    ],
)
def test_bad_config(config, says):
    with pytest.raises(InputError, match=says):
        QuantizationConfig.from_dict(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_bytes_of_a_token_are_those_that_a_long_cache_grows_by(family, bits, dtype):
    model, _ = random_mla(family, rope_dim=16, rank=40)
    sizes, sized = AttentionSizes.of(model.config), []
    for length in (256, 512):
        cache = quantized_cache(nbits=bits)
        for index in range(sizes.layers):
            latent = normal(1, 1, length, 40, dtype=dtype)
            cache.update(latent, normal(1, sizes.kv_heads, length, 16, dtype=dtype), index)
        sized.append(cache_bytes(cache))
    quantization = QuantizationConfig(nbits=bits)
    expected = quantized_bytes_per_token(model.config, quantization, itemsize=dtype.itemsize)
    assert (sized[1] - sized[0]) / 256 == expected
