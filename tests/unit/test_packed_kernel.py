"""Latents of rows of bytes by the Triton kernel are those that `unpack` gives, and models decode with it."""

import pytest
import torch
from helpers import logits_of_backends, prompt_inputs, random_mla, shallow
from test_kernels import DEVICE

from mha2mla_vlm.algorithms.rounding import rounded
from mha2mla_vlm.config import LatentBits
from mha2mla_vlm.model.absorbed import Up
from mha2mla_vlm.model.cache.packed import PackedTokens, pack

pytest.importorskip("triton")
BITS = [(3, 5, 6, 8), (0, 0, 2, 0), (2, 0, 0, 4), (0, 7, 0, 0), (1, 1, 30, 100)]


def packed(bits, dtype, total=37, batch=2):
    """Random latents, rounded, as a cache holds them."""
    torch.manual_seed(0)
    bits = LatentBits(*bits)
    latent = rounded(torch.randn(batch, total, bits.rank) * 40, bits).to(DEVICE)
    keys = torch.randint(-127, 128, (batch, 2, total, 6), device=DEVICE).to(torch.int8)
    return PackedTokens(pack(latent, bits), keys, bits, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bits", BITS, ids=str)
def test_unpacks_as_its_specification(bits, dtype):
    from mha2mla_vlm.model.kernels.triton_packed import unpacked

    stored = packed(bits, dtype)
    assert all(torch.equal(a, b) for a, b in zip(unpacked(stored), stored.whole(), strict=True))


def test_rows_of_a_larger_buffer():
    from mha2mla_vlm.model.kernels.triton_packed import unpacked

    stored = packed(BITS[0], torch.float32)
    room = torch.full((2, 60, stored.rows.shape[2]), 7, dtype=torch.uint8, device=DEVICE)
    room[:, :37] = stored.rows
    view = PackedTokens(room[:, :37], stored.k_rope, stored.bits, stored.dtype)
    assert torch.equal(unpacked(view)[0], stored.whole()[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_take_such_rows_of_their_dtype(dtype):
    from mha2mla_vlm.model.kernels import triton_decode

    stored = packed(BITS[0], torch.float32)
    ups = [Up(torch.randn(2 * 10, stored.bits.rank, device=DEVICE).to(dtype), None, 2, 2)]
    q_rope, q_nope = (torch.randn(2, 4, 1, width, device=DEVICE).to(dtype) for width in (6, 2))
    assert triton_decode.can_run(q_rope, q_nope, ups, stored) == (dtype == stored.dtype)


@pytest.mark.parametrize("rotate_at", ["write", "read"])
def test_models_of_such_latents_decode_with_it(family, rotate_at):
    model, processor = random_mla(family, rotate_at=rotate_at, bits=(4, 8, 12, 16))
    model = shallow(model).to(DEVICE)
    inputs = {k: v.to(DEVICE) for k, v in prompt_inputs(family, processor, ["image"]).items()}
    expected, got = logits_of_backends(model, inputs, "torch", "triton")
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)
