"""Latents of rows of bytes in one Triton kernel; `cache.packed.unpack` is its specification.

The latents of one layer at a time are then numbers, which the other kernels take.

Shapes: B batch, S all tokens, b bytes of a row, r latent dims.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from mha2mla_vlm.config import LatentBits
from mha2mla_vlm.model.absorbed import Piece, Up
from mha2mla_vlm.model.cache.latent import Pieces
from mha2mla_vlm.model.cache.packed import PackedTokens
from mha2mla_vlm.model.cache.pages import Paged
from mha2mla_vlm.model.kernels.stored import numbers
from mha2mla_vlm.model.kernels.triton_parts import DTYPES, power, rows_dense
from mha2mla_vlm.utils.compat import is_plain_tensor

NUMBERS = 4096  # that a program makes


@triton.jit
def _unpack_kernel(
    packed, latent, total, rank, sixteen, eight, four, two, row_b, row_s,
    RANK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    token, channel = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, RANK)
    # a channel's place among those of 8, of 4 and of 2 bits; codes of 4 bits share bytes by halves of their
    # channels, those of 2 by quarters
    of_eight = channel - sixteen
    of_four, of_two = of_eight - eight, of_eight - eight - four
    halves, quarters = tl.maximum(four // 2, 1), tl.maximum(two // 4, 1)
    start = 2 * sixteen + eight
    byte = tl.where(of_four < four, start + of_four % halves, start + four // 2 + of_two % quarters)
    shift = tl.where(of_four < four, of_four // halves * 4, of_two // quarters * 2)
    ones = tl.where(of_four < four, 15, 3)
    byte = tl.where(of_eight < eight, 2 * sixteen + of_eight, byte)
    shift, ones = tl.where(of_eight < eight, 0, shift), tl.where(of_eight < eight, 255, ones)
    is_half = channel < sixteen
    byte = tl.where(is_half, 2 * channel, byte)
    cells = packed + batch * row_b + token.to(tl.int64)[:, None] * row_s + byte[None, :]
    known = (token < total)[:, None] & (channel < rank)[None, :]
    codes = tl.load(cells, mask=known, other=0).to(tl.int32)
    high = tl.load(cells + 1, mask=known & is_half[None, :], other=0).to(tl.int32)
    halves_found = (codes | (high << 8)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    steps = ((codes >> shift[None, :]) & ones[None, :]).to(tl.float32) - ones[None, :] * 0.5
    found = tl.where(is_half[None, :], halves_found, steps)
    at = (batch * total + token.to(tl.int64)) * rank
    tl.store(latent + at[:, None] + channel[None, :], found.to(latent.dtype.element_ty), mask=known)


def can_take(
    q_rope: torch.Tensor, q_nope: torch.Tensor, ups: Sequence[Up], stored: Piece | Pieces | Paged
) -> bool:
    """Whether the kernels take these: stored as they are or as rows of bytes, all of one dtype they know."""
    if isinstance(stored, Paged) and stored.packed is not None:
        return False
    if isinstance(stored, Pieces) and not isinstance(stored, PackedTokens):
        return False
    tensors = [q_rope, q_nope, *numbers(stored), *(up.weight for up in ups)]
    known = all(x.dtype == q_rope.dtype and x.dtype in DTYPES for x in tensors)
    return known and all(map(is_plain_tensor, tensors)) and all(up.weight.is_contiguous() for up in ups)


def unpacked(stored: PackedTokens) -> Piece:
    """Latents `[B, S, r]` and rotated keys `[B, G, S, R]` of a layer's tokens, as numbers."""
    latent = _unpack(rows_dense(stored.rows), list(stored.bits), stored.dtype)
    return latent, stored.k_rope.to(stored.dtype)


@torch.library.custom_op("mha2mla_vlm::unpack_latents", mutates_args=())
def _unpack(rows: torch.Tensor, counts: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Latents `[B, S, r]` of `rows [B, S, b]`, which have `counts` channels of 16, 8, 4 and 2 bits."""
    batch, total, _ = rows.shape
    rank = LatentBits(*counts).rank
    latent = rows.new_empty(batch, total, rank, dtype=dtype)
    size = _sizes(rank)
    _unpack_kernel[(triton.cdiv(total, size["TOKENS"]), batch)](
        rows, latent, total, rank, *counts, *rows.stride()[:2], **size
    )
    return latent


def _sizes(rank: int) -> dict[str, int]:
    return {"RANK": power(rank), "TOKENS": max(1, NUMBERS // power(rank))}


@_unpack.register_fake
def _(rows, counts, dtype):
    return rows.new_empty(*rows.shape[:2], LatentBits(*counts).rank, dtype=dtype)
