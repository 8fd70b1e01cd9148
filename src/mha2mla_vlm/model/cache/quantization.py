"""Integers of 8, 4 or 2 bits for latents and rotated keys. Pure functions over tensors.

Latent channels differ in spread by orders of magnitude, and alike over tokens, so each channel has its
own range for every block of tokens (as keys have in KIVI, arXiv 2402.02750).

Shapes: B batch, G heads, n tokens of whole blocks, g tokens in a block, C channels.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

BITS = (8, 4, 2)


class Quantized(NamedTuple):
    """`x ~ low + codes * step`: codes `[B, G, n/g, g, C*bits/8]`, channels packed in bytes, and ranges.

    `low` and `step [B, G, n/g, C]` are float16, or float32 where x was; `channels` is C.
    """

    codes: torch.Tensor
    low: torch.Tensor
    step: torch.Tensor
    channels: int
    bits: int

    @property
    def tokens(self) -> int:
        """n."""
        return self.codes.shape[2] * self.codes.shape[3]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What is stored."""
        return self.codes, self.low, self.step

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Quantized":
        """The same with a function of every tensor, such as a selection of rows or blocks."""
        codes, low, step = (function(x) for x in self.tensors)
        return Quantized(codes, low, step, self.channels, self.bits)

    def followed_by(self, other: "Quantized") -> "Quantized":
        """These blocks, then those of `other`."""
        pairs = zip(self.tensors, other.tensors, strict=True)
        codes, low, step = (torch.cat(pair, dim=2) for pair in pairs)
        return Quantized(codes, low, step, self.channels, self.bits)


def quantize(x: torch.Tensor, bits: int, block: int) -> Quantized:
    """Round `x [B, G, n, C]`, n a multiple of `block`, to `bits` bits."""
    blocks = x.float().unflatten(2, (-1, block))
    kept = torch.float32 if x.dtype == torch.float32 else torch.float16
    limits = torch.finfo(kept)
    low, high = (x.clamp(limits.min, limits.max) for x in (blocks.amin(3), blocks.amax(3)))
    low, step = low.to(kept), ((high - low) / (2**bits - 1)).clamp_min(limits.tiny).to(kept)
    codes = ((blocks - low.float()[:, :, :, None]) / step.float()[:, :, :, None]).round()
    packed = pack_codes(codes.clamp(0, 2**bits - 1).byte(), bits)
    return Quantized(packed, low, step, x.shape[-1], bits)


def dequantize(x: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """`[B, G, n, C]` again."""
    codes = _unpack(x.codes, x.bits)[..., : x.channels].to(dtype)
    values = codes * x.step.to(dtype)[:, :, :, None] + x.low.to(dtype)[:, :, :, None]
    return values.flatten(2, 3)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes of the last dim, each with the codes of 8 / bits channels, one from each equal part."""
    parts = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % parts))
    packed = torch.zeros_like(codes.chunk(parts, dim=-1)[0])
    for index, part in enumerate(codes.chunk(parts, dim=-1)):
        packed |= part << (bits * index)
    return packed


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return packed
    return torch.cat([(packed >> at) & (2**bits - 1) for at in range(0, 8, bits)], dim=-1)
