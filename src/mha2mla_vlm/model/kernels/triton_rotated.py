"""Flash decoding in Triton over keys that are rotated at read; `rebuilt.Rebuilt` is its specification.

Each program takes the query heads of one KV head over one split of the cache's tokens. For each tile of
tokens it makes the head's keys of latents, by the up projection of each modality that the split holds,
rotates them, and meets the queries; values are summed as latents. `triton_decode` merges the splits.

Shapes: B batch, S all tokens, G KV heads, M query heads per KV head, T new tokens, R rope dims, C = R / 2,
D head dim, r latent dims, K modalities, P splits; Q = G * M * T rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from mha2mla_vlm.model.absorbed import Queries, Sums, Up, absorb, expand
from mha2mla_vlm.model.cache.latent import Pieces
from mha2mla_vlm.model.kernels.triton_decode import (
    DTYPES,
    _add_tile,
    _count_visual,
    _mask_kind,
    _masked,
    _power,
    _read,
    _row_mask,
    _rows_dense,
    _write_shares,
    as_sums,
    merged,
    split_size,
)
from mha2mla_vlm.model.rebuilt import Rebuilt
from mha2mla_vlm.utils.compat import is_plain_tensor

MOST_RANK = 256  # whose up projection of a head stays with a program; longer ones are read part by part


@triton.jit
def _key_halves(latent, up, half, at, column, seen, in_half, rank, PART: tl.constexpr):
    """First and second numbers of the pairs `[TILE, C]` of keys before RoPE, over parts of the latent."""
    first = tl.zeros([at.shape[0], column.shape[0]], tl.float32)
    second = tl.zeros([at.shape[0], column.shape[0]], tl.float32)
    for begin in range(0, rank, PART):
        inner = begin + tl.arange(0, PART)
        tile = _read(latent, at, inner, seen, inner < rank)
        a = _read(up, column * rank, inner, in_half, inner < rank)
        b = _read(up, (half + column) * rank, inner, in_half, inner < rank)
        first += tl.dot(tile, tl.trans(a), input_precision="ieee")
        second += tl.dot(tile, tl.trans(b), input_precision="ieee")
    return first, second


@triton.jit
def _split_kernel(
    q_rope, q_latent, constant, latent, text_up, last_up, text_bias, last_bias, cos, sin, pairs, visual, mask,
    filled, mixed, lse,
    kv_heads, head_rows, new, total, rank, half, head_up, splits,
    latent_b, latent_s, table_b, table_s, visual_b, mask_b, mask_t, filled_b,
    MASK: tl.constexpr, FILLED: tl.constexpr, CONSTANT: tl.constexpr, NOPE: tl.constexpr, BIAS: tl.constexpr,
    VISUAL: tl.constexpr, KINDS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
    RANK: tl.constexpr, HALF: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    batch, split, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    group, part = block % kv_heads, block // kv_heads
    rows = kv_heads * head_rows
    start = split * SPLIT
    stop = tl.minimum(start + SPLIT, total)
    if FILLED:
        stop = tl.minimum(stop, tl.load(filled + batch * filled_b).to(tl.int32))
    inside = part * ROWS + tl.arange(0, ROWS)  # of the head's rows
    in_rows, row = inside < head_rows, group * head_rows + inside
    dim, column = tl.arange(0, RANK), tl.arange(0, HALF)
    in_rank, in_half = dim < rank, column < half
    place = (batch * rows + row) * 2 * half
    first_query = _read(q_rope, place, column, in_rows, in_half)
    second_query = _read(q_rope, place, half + column, in_rows, in_half)
    pair = tl.load(pairs + group * half + column, mask=in_half, other=0)
    mask_row = row[:, None]  # not looked at where there is no mask
    if MASK != 0:
        mask_row = mask + batch * mask_b + (inside % new)[:, None] * mask_t
    count = _count_visual(visual, batch * visual_b, start, stop, VISUAL, SPLIT)
    for kind in tl.static_range(KINDS):
        present = (count > 0) if kind == 1 else (count < stop - start)
        here = (batch * splits + split) * KINDS + kind
        top, mass = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, RANK], tl.float32)
        if present:
            up = text_up if kind == 0 else last_up
            bias = text_bias if kind == 0 else last_bias
            added = tl.zeros([ROWS], tl.float32)
            if CONSTANT and kind == 0:
                added = tl.load(constant + batch * rows + row, mask=in_rows, other=0.0).to(tl.float32)
            for begin in range(start, stop, TILE):
                s = begin + tl.arange(0, TILE)
                seen = s < stop
                own, at = up + group * head_up * rank, batch * latent_b + s.to(tl.int64) * latent_s
                a, b = _key_halves(latent, own, half, at, column, seen, in_half, rank, PART)
                if BIAS:
                    shift = bias + group * head_up
                    a += tl.load(shift + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
                    b += tl.load(shift + half + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
                where = batch * table_b + s * table_s
                turn_cos = _read(cos, where, pair, seen, in_half).to(tl.float32)
                turn_sin = _read(sin, where, pair, seen, in_half).to(tl.float32)
                first = (a * turn_cos - b * turn_sin).to(first_query.dtype)
                second = (b * turn_cos + a * turn_sin).to(first_query.dtype)
                scores = tl.dot(first_query, tl.trans(first), input_precision="ieee")
                scores += tl.dot(second_query, tl.trans(second), input_precision="ieee")
                tile = _read(latent, at, dim, seen, in_rank)
                if NOPE:
                    query_at = ((kind * tl.num_programs(0) + batch) * rows + row) * rank
                    query = _read(q_latent, query_at, dim, in_rows, in_rank)
                    scores += tl.dot(query, tl.trans(tile), input_precision="ieee")
                scores += added[:, None]
                if VISUAL:
                    is_visual = tl.load(visual + batch * visual_b + s, mask=seen, other=0).to(tl.int32)
                    seen = seen & (is_visual == kind)
                scores = _masked(scores, seen[None, :] & in_rows[:, None], mask_row + s[None, :], MASK)
                top, mass, acc = _add_tile(top, mass, acc, scores, tile)
            top = _write_shares(mixed, here * rows + row, dim, rank, top, mass, acc, in_rows, in_rank)
        tl.store(lse + here * rows + row, top, mask=in_rows)


def can_run(q_rope: torch.Tensor, q_nope: torch.Tensor, ups: Sequence[Up], stored: Rebuilt) -> bool:
    """Whether the kernel takes these tensors: latents stored as they are, in a dtype that it knows."""
    if isinstance(stored.stored, Pieces):
        return False
    tensors = (q_rope, q_nope, stored.stored[0], *(up.weight for up in ups))
    known = all(x.dtype == q_rope.dtype and x.dtype in DTYPES for x in tensors)
    return known and all(map(is_plain_tensor, tensors)) and all(up.weight.is_contiguous() for up in ups)


def decode(
    q_rope: torch.Tensor,
    q_nope: torch.Tensor,
    ups: Sequence[Up],
    scaling: float,
    stored: Rebuilt,
    visual: torch.Tensor | None,
    mask: torch.Tensor | None,
    filled: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over latents, as `cpu_decode.decode`; the up projections of values are PyTorch's."""
    queries = absorb(q_rope, q_nope, ups, scaling)
    return expand(attend(queries, stored, visual, mask, filled), ups, q_rope.shape[2])


def attend(
    queries: Queries,
    stored: Rebuilt,
    visual: torch.Tensor | None,
    mask: torch.Tensor | None,
    filled: torch.Tensor | None = None,
) -> Sums:
    """`absorbed.attend_pieces` over tokens whose modality is `visual [B, S]` (None: one modality).

    `filled` is how many of the S tokens there are, if a mask hides the others: they are not read.
    """
    ups, angles = stored.ups, stored.angles
    latent = [x for x in queries.latent if x is not None]
    output, text_mass = _decode(
        queries.rope.contiguous(),
        torch.stack(latent) if latent else None,
        queries.text_constant,
        stored.latents(),
        [up.weight for up in ups],
        [up.bias for up in ups if up.bias is not None],
        _rows_dense(angles.cos),
        _rows_dense(angles.sin),
        angles.pairs,
        visual,
        mask,
        filled,
    )
    return as_sums(output, text_mass)


@torch.library.custom_op("mha2mla_vlm::rotated_decode", mutates_args=())
def _decode(
    q_rope: torch.Tensor,
    q_latent: torch.Tensor | None,
    constant: torch.Tensor | None,
    latent: torch.Tensor,
    ups: list[torch.Tensor],
    biases: list[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    pairs: torch.Tensor,
    visual: torch.Tensor | None,
    mask: torch.Tensor | None,
    filled: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed latents `[K, B, Q, r]` and the weight of text tokens `[B, Q, 1]`, of `q_rope [B, G, M*T, R]`.

    `q_latent [K, B, Q, r]` meets latents `[B, S, r]` themselves; the first R rows of each KV head in `ups`,
    of each modality, and their `biases`, if there are any, make keys.
    """
    batch, kv_heads, head_rows, rope_dim = q_rope.shape
    kinds, rank, total = len(ups), latent.shape[-1], latent.shape[1]
    rows, mask = kv_heads * head_rows, _row_mask(mask, batch)
    new = 1 if mask is None else mask.shape[1]
    size, latent, cos = _sizes(head_rows, rank, rope_dim // 2), _rows_dense(latent), cos.expand(batch, -1, -1)
    blocks = kv_heads * triton.cdiv(head_rows, size["ROWS"])
    split = split_size(total, batch * blocks)
    splits = triton.cdiv(total, split)
    mixed = latent.new_empty(batch, splits, kinds, rows, rank, dtype=torch.float32)
    lse = latent.new_empty(batch, splits, kinds, rows, dtype=torch.float32)
    _split_kernel[(batch, splits, blocks)](
        q_rope, q_latent, constant, latent, ups[0], ups[-1], *(biases[:1] + biases[-1:] or (None, None)),
        cos, sin.expand(batch, -1, -1), pairs, visual, mask, filled, mixed, lse,
        kv_heads, head_rows, new, total, rank, rope_dim // 2, len(ups[0]) // kv_heads, splits,
        *latent.stride()[:2], *cos.stride()[:2], 0 if visual is None else visual.stride(0),
        *((0, 0) if mask is None else mask.stride()[:2]),
        0 if filled is None or filled.ndim == 0 else filled.stride(0),
        MASK=_mask_kind(mask), FILLED=filled is not None, CONSTANT=constant is not None,
        NOPE=q_latent is not None, BIAS=bool(biases), VISUAL=visual is not None, KINDS=kinds,
        SPLIT=split, **size, **_launch(rank),
    )  # fmt: skip
    return merged(mixed, lse, latent.dtype)


@_decode.register_fake
def _(q_rope, q_latent, constant, latent, ups, biases, cos, sin, pairs, visual, mask, filled):
    batch, kv_heads, head_rows, _ = q_rope.shape
    rows, rank = kv_heads * head_rows, latent.shape[-1]
    return latent.new_empty(len(ups), batch, rows, rank), latent.new_empty(batch, rows, 1)


def _sizes(head_rows: int, rank: int, half: int) -> dict[str, int]:
    """Query rows of a program, tokens of a tile, and the parts in which latents make keys."""
    most = _power(rank)
    tile = 64 if rank <= MOST_RANK else 32 if rank <= 512 else 16
    sizes = {"ROWS": min(_power(head_rows), 32 if rank <= 512 else 16), "TILE": tile}
    return {**sizes, "RANK": most, "HALF": _power(half), "PART": min(most, MOST_RANK)}


def _launch(rank: int) -> dict[str, Any]:
    """Warps, so that sums fit registers, and tiles on their way, so that they fit shared memory."""
    return {"num_warps": 8 if rank > 128 else 4, "num_stages": 2}
