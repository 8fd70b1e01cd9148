"""Latents whose channels differ in bits as rows of bytes: 16 bits first, then 8, 4 and 2.

A row can be read without any other, so whatever holds rows holds these: growing, static and offloaded caches.

Shapes: B batch, S all tokens, G KV heads, R rope dims per head, r latent dims, b bytes of a row.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import Cache, QuantizedCache

from mha2mla_vlm.config import CHANNEL_BITS, LatentBits
from mha2mla_vlm.model.cache.latent import Pieces
from mha2mla_vlm.model.cache.quantization import pack_codes

PIECE = 4096  # tokens that are unpacked at a time


def pack(latent: torch.Tensor, bits: LatentBits) -> torch.Tensor:
    """Rows of bytes `[.., b]` of latents `[.., r]` that `bits.rounded` gave."""
    halves, *others = latent.split(bits.counts, dim=-1)
    codes = [halves.to(torch.float16).contiguous().view(torch.uint8)] if bits.sixteen else []
    for part, each in zip(others, CHANNEL_BITS[1:], strict=True):
        codes.append(pack_codes((part + (2 ** (each - 1) - 0.5)).to(torch.uint8), each))
    return torch.cat(codes, dim=-1)


def unpack(rows: torch.Tensor, bits: LatentBits, dtype: torch.dtype) -> torch.Tensor:
    """The latents `[.., r]` of rows of bytes `[.., b]`; exact in the dtype that they had."""
    found = torch.empty(*rows.shape[:-1], bits.rank, dtype=dtype, device=rows.device)
    halves, *others = rows.split(bits.bytes, dim=-1)
    first, *parts = found.split(bits.counts, dim=-1)
    if bits.sixteen:  # copied, for views of other sizes mind the strides of single rows too
        first.copy_(halves.clone(memory_format=torch.contiguous_format).view(torch.float16))
    for part, codes, each in zip(parts, others, CHANNEL_BITS[1:], strict=True):
        for number, channels in enumerate(part.split(max(codes.shape[-1], 1), dim=-1)):
            channels.copy_(codes if each == 8 else (codes >> each * number) & (2**each - 1))
        part.sub_(2 ** (each - 1) - 0.5)
    return found


def cached(
    cache: Cache,
    layer_idx: int,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    bits: LatentBits | None = None,
) -> tuple[Any, torch.Tensor]:
    """What a layer holds once new latents `[B, 1, T, r]` and rotated keys `[B, G, T, R]` are added.

    Latents that have `bits`, and the rotated keys beside them, are held as bytes, but in caches that quantise
    numbers themselves.
    transformers' quantised layers hold two parts that are not empty: where no rotated keys are cached, these
    are halves of the latent.
    """
    quantizes = isinstance(cache, QuantizedCache)
    if bits is not None and not quantizes and getattr(cache, "holds_rows", True):
        rows, keys = cache.update(pack(latent, bits), k_rope.to(torch.int8), layer_idx)
        if rows.shape[2] == latent.shape[2]:  # the first tokens
            return latent, k_rope
        return PackedTokens(rows[:, 0], keys, bits, latent.dtype), keys
    if k_rope.shape[-1] or not quantizes:
        return cache.update(latent, k_rope, layer_idx)
    half = latent.shape[-1] // 2
    halves = cache.update(latent[..., :half], latent[..., half:], layer_idx)
    latent = torch.cat(halves, dim=-1)
    return latent, k_rope.new_empty(*k_rope.shape[:2], latent.shape[2], 0)


class PackedTokens(Pieces):
    """The tokens of a layer: their latents as `rows [B, S, b]`, and rotated keys `[B, G, S, R]` in int8."""

    def __init__(
        self, rows: torch.Tensor, k_rope: torch.Tensor, bits: LatentBits, dtype: torch.dtype
    ) -> None:
        self.rows, self.k_rope, self.bits, self.dtype = rows, k_rope, bits, dtype
        self.length = rows.shape[1]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, self.length, PIECE):
            stop = start + PIECE
            latent = unpack(self.rows[:, start:stop], self.bits, self.dtype)
            yield latent, self.k_rope[:, :, start:stop].to(self.dtype)


def stored_tokens(layer: Any, bits: LatentBits | None, dtype: torch.dtype) -> Any:
    """The tokens of a cache's layer in the form that attention takes, of `dtype` where they are bytes."""
    if bits is None or layer.keys.dtype != torch.uint8:
        return layer.stored()
    return PackedTokens(layer.keys[:, 0], layer.values, bits, dtype)
