"""Latents in pages that requests share, as serving engines keep them. Pure functions over tensors.

A row of a page is one token's latent and the rotated keys of all KV heads, or only the latent where keys are
rotated at read. Its modality is the lowest bit of its last latent number: so it takes no room, and pages can
be copied, sent and shared as they are. So are positions, which keys that are rotated at read need: the last
numbers of the rows of one layer are the bits of an int32 for each number of a position, whatever the dtype.
Where channels of the latent differ in bits a row begins with bytes instead (`PackedRows`).

Shapes: B pages in all, N tokens of a page, C numbers of a row, n requests, P pages of the longest, T tokens,
G KV heads, R rope dims, r latent dims, A numbers in a position, W numbers of a row that hold it.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch

from mha2mla_vlm.config import LatentBits
from mha2mla_vlm.model.absorbed import Piece
from mha2mla_vlm.model.cache.packed import PackedTokens, pack, unpack

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def store(
    pages: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, visual: torch.Tensor | None, rank: int
) -> None:
    """Write `rows [T, c]`, marked with `visual [T]` if given, to the `slots [T]` of `pages [B, N, C]`, whose
    rows begin with these c numbers.
    """
    size = pages.shape[1]
    rows = rows if visual is None else marked(rows, visual, rank)
    pages[slots // size, slots % size, : rows.shape[1]] = rows


def marked(rows: torch.Tensor, visual: torch.Tensor, rank: int) -> torch.Tensor:
    """A copy of `rows [.., C]` from which `is_visual` reads the modality again."""
    rows = rows.clone()
    last = rows.view(_BITS[rows.dtype])[..., rank - 1]
    last.bitwise_and_(-2).bitwise_or_(visual.to(last.dtype))
    return rows


def is_visual(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """Which of the marked `rows [.., C]` are visual tokens."""
    return (rows.view(_BITS[rows.dtype])[..., rank - 1] & 1).bool()


def position_width(axes: int, dtype: torch.dtype) -> int:
    """Numbers of this dtype that hold a position of `axes` numbers."""
    return axes * torch.int32.itemsize // dtype.itemsize


def store_positions(places: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
    """Write `positions [A, T]`, each below 2^31, to the `slots [T]` of `places [B, N, W]`."""
    size, bits = places.shape[1], places.view(_BITS[places.dtype])  # as floats they might be NaN
    halves = positions.to(torch.int32).contiguous()[..., None].view(bits.dtype)  # [A, T, W / A]
    bits[slots // size, slots % size] = halves.transpose(0, 1).flatten(1)


def read_positions(places: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Positions `[A, n, P * N]` of the tokens in the pages `table [n, P]` of `places [B, N, W]`."""
    found = places.view(_BITS[places.dtype])[table].flatten(1, 2)
    return found.contiguous().view(torch.int32).permute(2, 0, 1)


def as_piece(rows: torch.Tensor, rank: int, kv_heads: int) -> Piece:
    """Latents `[n, T, r]` and rotated keys `[n, G, T, R]` of `rows [n, T, C]`, as views."""
    return rows[..., :rank], rows[..., rank:].unflatten(-1, (kv_heads, -1)).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """What the bytes of a row are: a latent of these `bits`, `rope` numbers (G * R) of rotated keys in int8,
    and the modality.
    """

    bits: LatentBits
    rope: int

    @property
    def size(self) -> int:
        """Bytes of a row."""
        return self.bits.row_bytes + self.rope + 1

    def width(self, dtype: torch.dtype) -> int:
        """Numbers of this dtype that hold a row."""
        return -(-self.size // dtype.itemsize)

    def pack(self, latent: torch.Tensor, k_rope: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        """Bytes `[T, size]` of latents `[T, r]` and rotated keys `[T, G * R]`, both rounded."""
        keys = k_rope.to(torch.int8).view(torch.uint8)
        return torch.cat([pack(latent, self.bits), keys, visual[:, None].to(torch.uint8)], dim=-1)

    def unpack(self, rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and rotated keys as numbers `[.., r + G * R]`, and the modality `[..]`, of bytes `[.., b]`,
        which begin with a row.
        """
        sizes = [self.bits.row_bytes, self.rope, 1]
        latent, keys, visual = rows[..., : self.size].split(sizes, dim=-1)
        numbers = [unpack(latent, self.bits, dtype), keys.contiguous().view(torch.int8).to(dtype)]
        return torch.cat(numbers, dim=-1), visual[..., 0].bool()


def store_bytes(pages: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """Write rows of bytes `[T, b]` to the `slots [T]` of `pages [B, N, C]`, whose rows begin with them."""
    size = pages.shape[1]
    pages.view(torch.uint8)[slots // size, slots % size, : rows.shape[1]] = rows


@dataclass(frozen=True)
class Paged:
    """The first `lengths [n]` tokens of n requests, whose `pages [B, N, C]` are those in `table [n, P]`.

    Their rows are numbers, or bytes as `packed` says.
    """

    pages: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    rank: int
    kv_heads: int
    packed: PackedRows | None = None

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
        """Latents `[B, N, r]` and rotated keys `[B, G, N, R]` of all pages; where rows are bytes, bytes
        `[B, N, b]` and int8.
        """
        if self.packed is None:
            return as_piece(self.pages, self.rank, self.kv_heads)
        size = self.packed.bits.row_bytes
        rows = self.pages.view(torch.uint8)[..., : size + self.packed.rope]
        latent, keys = as_piece(rows, size, self.kv_heads)
        return latent, keys.view(torch.int8)

    def rows(self) -> torch.Tensor:
        """The requests' rows of numbers, packed or not, one after another: `[n, P * N, C]`, a copy."""
        if self.packed is None:
            return self.pages[self.table].flatten(1, 2)
        return self.packed.unpack(self._bytes(), self.pages.dtype)[0]

    def latent_bytes(self) -> PackedTokens:
        """The requests' packed latents as they lie, one after another, `P * N` tokens each: a copy."""
        assert self.packed is not None, "rows of bytes"
        bits, rows = self.packed.bits, self._bytes()
        no_keys = rows.new_empty(len(rows), self.kv_heads, rows.shape[1], 0)
        return PackedTokens(rows[..., : bits.row_bytes], no_keys, bits, self.pages.dtype)

    def _bytes(self) -> torch.Tensor:
        return self.pages.view(torch.uint8)[self.table].flatten(1, 2)

    def visual(self) -> torch.Tensor:
        """Modality of the requests' tokens, `[n, P * N]`."""
        if self.packed is not None:
            last = self.pages.view(torch.uint8)[..., self.packed.size - 1]
            return last[self.table].flatten(1).bool()
        bits = self.pages.view(_BITS[self.pages.dtype])[..., self.rank - 1]
        return (bits[self.table].flatten(1) & 1).bool()
