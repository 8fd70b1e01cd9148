"""Latents in pages that requests share, as serving engines keep them. Pure functions over tensors.

A row of a page is one token's latent and the rotated keys of all KV heads. Its modality is the lowest bit of
its last latent number: so it takes no room, and pages can be copied, sent and shared as they are.

Shapes: B pages in all, N tokens of a page, C = r + G * R numbers of a row, n requests, P pages of the
longest, T tokens, G KV heads, R rope dims, r latent dims.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch

from mha2mla_vlm.model.absorbed import Piece

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def store(
    pages: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, visual: torch.Tensor | None, rank: int
) -> None:
    """Write `rows [T, C]`, marked with `visual [T]` if given, to the `slots [T]` of `pages [B, N, C]`."""
    size = pages.shape[1]
    pages[slots // size, slots % size] = rows if visual is None else marked(rows, visual, rank)


def marked(rows: torch.Tensor, visual: torch.Tensor, rank: int) -> torch.Tensor:
    """A copy of `rows [.., C]` from which `is_visual` reads the modality again."""
    rows = rows.clone()
    last = rows.view(_BITS[rows.dtype])[..., rank - 1]
    last.bitwise_and_(-2).bitwise_or_(visual.to(last.dtype))
    return rows


def is_visual(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """Which of the marked `rows [.., C]` are visual tokens."""
    return (rows.view(_BITS[rows.dtype])[..., rank - 1] & 1).bool()


def as_piece(rows: torch.Tensor, rank: int, kv_heads: int) -> Piece:
    """Latents `[n, T, r]` and rotated keys `[n, G, T, R]` of `rows [n, T, C]`, as views."""
    return rows[..., :rank], rows[..., rank:].unflatten(-1, (kv_heads, -1)).transpose(1, 2)


@dataclass(frozen=True)
class Paged:
    """The first `lengths [n]` tokens of n requests, whose `pages [B, N, C]` are those in `table [n, P]`."""

    pages: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    rank: int
    kv_heads: int

    @property
    def size(self) -> int:
        """Tokens of a page."""
        return self.pages.shape[1]

    @property
    def room(self) -> int:
        """Tokens that the pages of each request hold."""
        return self.table.shape[1] * self.size

    def for_kernel(self) -> Self:
        """The same with table and lengths as kernels read them: int32, rows dense."""
        table, lengths = (x.to(torch.int32).contiguous() for x in (self.table, self.lengths))
        return replace(self, table=table, lengths=lengths)

    def views(self) -> Piece:
        """Latents `[B, N, r]` and rotated keys `[B, G, N, R]` of all pages."""
        return as_piece(self.pages, self.rank, self.kv_heads)

    def rows(self) -> torch.Tensor:
        """The requests' rows one after another, copied: `[n, P * N, C]`."""
        return self.pages[self.table].flatten(1, 2)

    def visual(self) -> torch.Tensor:
        """Modality of the requests' tokens, `[n, P * N]`."""
        bits = self.pages.view(_BITS[self.pages.dtype])[..., self.rank - 1]
        return (bits[self.table].flatten(1) & 1).bool()
