"""Bits of latent channels: which are best, what rounding costs, and rows of bytes."""

import itertools
from dataclasses import replace

import pytest
import torch

from mha2mla_vlm.algorithms.bits import (
    ERRORS,
    best_bits,
    in_steps,
    key_steps,
    with_latents,
)
from mha2mla_vlm.algorithms.factorization.base import Outputs
from mha2mla_vlm.algorithms.factorization.low_rank import Latents, about_mean, pca_factors
from mha2mla_vlm.algorithms.rounding import KEY_LIMIT, rounded, rounded_keys
from mha2mla_vlm.algorithms.token_stats import TokenStats
from mha2mla_vlm.config import CHANNEL_BITS, LatentBits
from mha2mla_vlm.model.cache.packed import pack, unpack
from mha2mla_vlm.model.cache.pages import PackedRows, Paged, store_bytes

BITS = LatentBits(3, 5, 6, 8)


def lost(importance, counts):
    """What these numbers of channels cost."""
    bounds = [0, *itertools.accumulate(counts), len(importance)]
    errors = [*(ERRORS[bits] for bits in CHANNEL_BITS), 1.0]
    spans = zip(itertools.pairwise(bounds), errors, strict=True)
    return sum(float(importance[a:b].sum()) * error for (a, b), error in spans)


@pytest.mark.parametrize("row_bytes", [1, 3, 7, 12, 24])
@pytest.mark.parametrize("falling", [0.9, 2.0, 4.0])
def test_the_best_bits_are_those_of_all_that_fit(row_bytes, falling):
    importance = torch.exp(-torch.arange(24.0) * falling / 4)
    found = best_bits(importance, row_bytes)
    assert found.row_bytes <= row_bytes
    tried = [
        counts
        for counts in itertools.product(range(9), range(25), range(0, 25, 2), range(0, 25, 4))
        if LatentBits(*counts).row_bytes <= row_bytes and 0 < sum(counts) <= 24
    ]
    # of 4 bits it looks at multiples of four, of 16 at some numbers
    assert lost(importance, found) <= 1.3 * min(lost(importance, counts) for counts in tried) + 1e-12


def test_bytes_that_hold_no_channel_are_refused():
    with pytest.raises(ValueError, match="0 bytes hold no channels"):
        best_bits(torch.ones(8), 0)


def statistics(count=400, hidden=24, outputs=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, hidden, generator=generator) * torch.linspace(2, 0.1, hidden) + 0.5
    return inputs, torch.randn(outputs, hidden, generator=generator), TokenStats.of(inputs)


@pytest.mark.parametrize("mean", [True, False])
def test_counting_in_steps_changes_no_output(mean):
    inputs, weight, tokens = statistics()
    plain = pca_factors(weight, tokens.centered().moment, 16)
    plain = about_mean(plain, weight, tokens.mean) if mean else plain
    factors = with_latents(plain, Outputs(weight, torch.zeros(1, 8, dtype=torch.long)), tokens)
    coded = in_steps(factors, LatentBits(4, 4, 4, 4))
    before = inputs.double() @ plain.down.T @ plain.up.T + (0 if plain.shift is None else plain.shift)
    latents = inputs.double() @ coded.down.T + coded.offset
    torch.testing.assert_close(latents @ coded.up.T + coded.shift, before)
    torch.testing.assert_close(latents.mean(0), torch.zeros(16).double(), atol=1e-6, rtol=0)
    spread = latents.std(0)
    assert torch.all(spread[:4] < spread[12:] * 1.1)  # 16 bits: one; 2 bits: one; 8 and 4 bits more
    assert factors.latents.importance.diff().max() <= 0


def test_rounding_errs_as_expected_for_normal_numbers():
    torch.manual_seed(0)
    normal = torch.randn(200_000, 4)
    mean, spread = torch.zeros(4), torch.ones(4)
    eye = pca_factors(torch.eye(4), torch.eye(4), 4)
    identity = replace(eye, down=torch.eye(4), up=torch.eye(4), latents=Latents(mean, spread, spread))
    for number, bits in enumerate(CHANNEL_BITS):
        counts = LatentBits(*[4 if each == number else 0 for each in range(4)])
        coded = in_steps(identity, counts)
        latents = normal @ coded.down.T.float() + coded.offset.float()
        back = (rounded(latents, counts) - coded.offset.float()) @ coded.up.T.float()
        assert float((back - normal).square().mean()) <= 1.1 * ERRORS[bits]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [BITS, LatentBits(0, 5, 6, 8), LatentBits(3, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("shape", [(2, 7), (1, 1), (1,)], ids=str)
def test_rows_of_bytes_give_the_same_latents_again(dtype, bits, shape):
    latent = (torch.randn(*shape, bits.rank) * torch.logspace(-1, 3, bits.rank)).to(dtype)
    kept = rounded(latent, bits)
    rows = torch.cat([pack(kept, bits), torch.ones(*shape, 3, dtype=torch.uint8)], dim=-1)  # of wider rows
    assert rows.dtype == torch.uint8
    assert rows.shape == (*shape, bits.row_bytes + 3)
    assert torch.equal(unpack(rows[..., : bits.row_bytes], bits, dtype), kept)
    assert torch.equal(rounded(kept, bits), kept)
    assert (
        unpack(pack(rounded(latent.sign() * torch.finfo(dtype).max, bits), bits), bits, dtype)
        .isfinite()
        .all()
    )
    assert not bits.eight or not torch.equal(kept, latent)


def test_gradients_pass_where_numbers_are_in_range():
    latent = torch.tensor([[0.3, 100.0, 7.0, -3.0, 0.2, 1e9, 0.0, 0.0]], requires_grad=True)
    rounded(latent, LatentBits(0, 2, 2, 4)).sum().backward()
    assert latent.grad.tolist() == [[1, 1, 1, 1, 1, 0, 1, 1]]
    keys = torch.tensor([0.4, 300.0], requires_grad=True)
    rounded_keys(keys).sum().backward()
    assert keys.grad.tolist() == [1, 0]
    assert rounded_keys(torch.tensor([0.4, 300.0])).tolist() == [0, KEY_LIMIT]


def test_steps_of_keys_are_of_what_rope_turns():
    inputs, _, tokens = statistics()
    weight, bias = torch.randn(2, 6, 24), torch.randn(2, 6)
    keys = torch.einsum("grc,tc->tgr", weight, inputs) + bias
    a, b = keys.chunk(2, dim=-1)
    expected = ((a.square() + b.square()) / 2).mean(0).sqrt() / 12
    torch.testing.assert_close(key_steps(weight, bias, tokens).float(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_lie_in_pages(dtype):
    packed = PackedRows(bits=BITS, rope=6)
    latent = rounded(torch.randn(5, BITS.rank).mul(3).to(dtype), BITS)
    keys = rounded_keys(torch.randn(5, 6).mul(50).to(dtype))
    visual = torch.tensor([True, False, False, True, True])
    width = packed.width(dtype) + 4  # and what else lies there
    pages = torch.zeros(3, 4, width, dtype=dtype)
    store_bytes(pages, torch.tensor([8, 9, 10, 11, 0]), packed.pack(latent, keys, visual))
    stored = Paged(pages, torch.tensor([[2, 0]]), torch.tensor([5]), BITS.rank, 2, packed)
    assert torch.equal(stored.rows()[0, :5], torch.cat([latent, keys], dim=-1))
    assert torch.equal(stored.visual()[0, :5], visual)
