"""Flash decoding in Triton over keys that are rotated at read; `rebuilt.Rebuilt` is its specification.

Each program takes the query heads of one KV head over one split of the cache's tokens. For each tile of
tokens it makes the head's keys of latents, by the up projection of each modality that the split holds,
rotates them, and meets the queries; values are summed as latents. Tokens are the rows of all products, so
that few query heads fill matrix units. `triton_parts` merges the splits.

Shapes: those of `triton_parts`; M = H / G query heads per KV head, R rope dims, C = R / 2.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from mha2mla_vlm.model.absorbed import Up
from mha2mla_vlm.model.cache.packed import PackedTokens
from mha2mla_vlm.model.cache.pages import Paged
from mha2mla_vlm.model.kernels.triton_decode import TILES, absorbed
from mha2mla_vlm.model.kernels.triton_packed import can_take, unpacked
from mha2mla_vlm.model.kernels.triton_parts import (
    LEAST,
    LOG2_E,
    MOST_SHARED,
    UpParts,
    flags_of,
    in_units,
    log_sum,
    mask_kind,
    masked,
    merged,
    power,
    read,
    row_mask,
    row_strides,
    rows_dense,
    softmax_step,
    split_tokens,
)
from mha2mla_vlm.model.rebuilt import Rebuilt

MOST_UP = 96 * 1024  # bytes of a head's up projection that stay with a program; else it is read in parts
LEAST_TILES = 4  # of a split
PART = 128
SPAN = 1024  # tokens whose modality is looked at together


@triton.jit
def _span(visual, place, start, stop, kind, VISUAL: tl.constexpr, WIDE: tl.constexpr):
    """First token of a modality from `start` to `stop`, and the one after its last."""
    low, high = start, stop
    if VISUAL:
        firsts = tl.full([WIDE], 0x7FFFFFFF, tl.int32)
        lasts = tl.full([WIDE], -1, tl.int32)
        for begin in range(start, stop, WIDE):
            s = begin + tl.arange(0, WIDE)
            own = (flags_of(visual, place, s, stop, VISUAL) == kind) & (s < stop)
            firsts, lasts = (
                tl.minimum(firsts, tl.where(own, s, 0x7FFFFFFF)),
                tl.maximum(lasts, tl.where(own, s, -1)),
            )
        low, high = tl.min(firsts), tl.max(lasts) + 1
    return low, high


@triton.jit
def _halves_in_parts(latent, up, half, at, column, seen, in_half, rank, PART: tl.constexpr):
    """First and second numbers of the pairs `[TILE, C]` of keys before RoPE, over parts of the latent."""
    first = tl.zeros([at.shape[0], column.shape[0]], tl.float32)
    second = tl.zeros([at.shape[0], column.shape[0]], tl.float32)
    for begin in range(0, rank, PART):
        inner = begin + tl.arange(0, PART)
        tile = read(latent, at, inner, seen, inner < rank)
        a = read(up, column * rank, inner, in_half, inner < rank)
        b = read(up, (half + column) * rank, inner, in_half, inner < rank)
        first = tl.dot(tile, tl.trans(a), first, input_precision="ieee")
        second = tl.dot(tile, tl.trans(b), second, input_precision="ieee")
    return first, second


@triton.jit
def _turns(cos, sin, first, near, step, columns, seen, in_half):
    """Cosines and sines of pairs of the tokens `near` one whose tables begin at `first`."""
    at = near * step
    return read(cos + first, at, columns, seen, in_half), read(sin + first, at, columns, seen, in_half)


@triton.jit
def _split_kernel(
    q_rope, q_latent, constant, latent, text_up, last_up, text_bias, last_bias, cos, sin, pairs, visual, mask,
    filled, mixed, lse, scale,
    kv_heads, head_rows, new, total, rank, half, head_up, split_size, query_b, query_h, query_t,
    latent_b, latent_s, table_b, table_s, visual_b, mask_b, mask_t, filled_b,
    MASK: tl.constexpr, FILLED: tl.constexpr, CONSTANT: tl.constexpr, NOPE: tl.constexpr, BIAS: tl.constexpr,
    PAIRS: tl.constexpr, VISUAL: tl.constexpr, KINDS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    RANK: tl.constexpr, HALF: tl.constexpr, PART: tl.constexpr, ALIGN: tl.constexpr,
    HALF_ALIGN: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    batch, split, block = tl.program_id(2).to(tl.int64), tl.program_id(0), tl.program_id(1)
    rank, latent_b, latent_s = rank * ALIGN, latent_b * ALIGN, latent_s * ALIGN
    half, table_b, table_s = half * HALF_ALIGN, table_b * HALF_ALIGN, table_s * HALF_ALIGN
    group, part = block % kv_heads, block // kv_heads
    rows = kv_heads * head_rows
    start = split * split_size
    stop = tl.minimum(start + split_size, total)
    if FILLED:
        stop = tl.minimum(stop, tl.load(filled + batch * filled_b).to(tl.int32))
    inside = part * ROWS + tl.arange(0, ROWS)  # of the head's rows
    in_rows, row = inside < head_rows, group * head_rows + inside
    dim, column, near = tl.arange(0, RANK), tl.arange(0, HALF), tl.arange(0, TILE)
    in_rank, in_half = dim < rank, column < half
    queries, query_at = q_rope + batch * query_b, row // new * query_h + row % new * query_t
    first_query = tl.trans(read(queries, query_at, column, in_rows, in_half))
    second_query = tl.trans(read(queries, query_at, half + column, in_rows, in_half))
    if PAIRS:
        pair = tl.load(pairs + group * half + column, mask=in_half, other=0).to(tl.int32)
    mask_row = row[None, :]  # not looked at where there is no mask
    if MASK != 0:
        mask_row = mask + batch * mask_b + (row % new)[None, :] * mask_t
    for kind in tl.static_range(KINDS):
        low, high = _span(visual, batch * visual_b, start, stop, kind, VISUAL, SPAN)
        sums, own = (batch * tl.num_programs(0) + split) * rows * KINDS, row * KINDS + kind
        top, mass = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
        if high > low:
            acc = tl.zeros([RANK, ROWS], tl.float32)
            up = (text_up if kind == 0 else last_up) + (batch * 0 + group) * head_up * rank
            bias = text_bias if kind == 0 else last_bias
            if PART == 0:
                first_up = tl.trans(read(up, column * rank, dim, in_half, in_rank))
                second_up = tl.trans(read(up, (half + column) * rank, dim, in_half, in_rank))
            if BIAS:
                bias += group * head_up
                first_bias = tl.load(bias + column, mask=in_half, other=0.0)
                second_bias = tl.load(bias + half + column, mask=in_half, other=0.0)
            if NOPE:
                query = read(q_latent + batch * rows * KINDS * rank, own * rank, dim, in_rows, in_rank)
                query = tl.trans(query)
            added = tl.zeros([ROWS], tl.float32)
            if CONSTANT and kind == 0:
                added = tl.load(constant + batch * rows + row, mask=in_rows, other=0.0) * scale
            each = tl.zeros([TILE, ROWS], tl.float32)
            # what is not read by columns side by side is read a tile ahead of time
            flags = flags_of(visual, batch * visual_b, low + near, high, VISUAL)
            if PAIRS:
                turn = batch * table_b + low * table_s
                next_cos, next_sin = _turns(cos, sin, turn, near, table_s, pair, low + near < high, in_half)
            for begin in range(low, high, TILE):
                s, here, own_flags = begin + near, batch * 0 + begin, flags  # of 64 bits
                flags = flags_of(visual, batch * visual_b, s + TILE, high, VISUAL)
                seen = s < high
                if PAIRS:
                    turn_cos, turn_sin = next_cos, next_sin
                    turn = batch * table_b + (here + TILE) * table_s
                    next_cos, next_sin = _turns(cos, sin, turn, near, table_s, pair, s + TILE < high, in_half)
                else:
                    turn = batch * table_b + here * table_s
                    turn_cos, turn_sin = _turns(cos, sin, turn, near, table_s, column, seen, in_half)
                tokens, at = latent + batch * latent_b + here * latent_s, near * latent_s
                tile = read(tokens, at, dim, seen, in_rank)
                if PART == 0:
                    a = tl.dot(tile, first_up, input_precision="ieee")
                    b = tl.dot(tile, second_up, input_precision="ieee")
                else:
                    a, b = _halves_in_parts(tokens, up, half, at, column, seen, in_half, rank, PART)
                a, b = a.to(tile.dtype), b.to(tile.dtype)  # rotated in the dtype that the original rotates in
                if BIAS:
                    a, b = a + first_bias[None, :], b + second_bias[None, :]
                first, second = a * turn_cos - b * turn_sin, b * turn_cos + a * turn_sin
                scores = tl.dot(first, first_query, input_precision="ieee")  # [TILE, ROWS]
                scores = tl.dot(second, second_query, scores, input_precision="ieee")
                if NOPE:
                    scores = tl.dot(tile, query, scores, input_precision="ieee")
                scores = scores * scale + added[None, :]
                if VISUAL:
                    seen = seen & (own_flags == kind)
                scores = masked(scores, seen[:, None] & in_rows[None, :], mask_row + s[:, None], MASK)
                top, weights, rescale = softmax_step(scores, top, 0)
                each = each * rescale[None, :] + weights
                acc = tl.dot(
                    tl.trans(tile), weights.to(tile.dtype), acc * rescale[None, :], input_precision="ieee"
                )
            mass = tl.sum(each, 0)
            shares = acc / tl.where(mass > 0, mass, 1.0)[None, :]
            cells = mixed + sums * rank + (own * rank)[None, :] + dim[:, None]
            found = in_rows & (mass > 0)
            tl.store(cells, shares.to(mixed.dtype.element_ty), mask=in_rank[:, None] & found[None, :])
        tl.store(lse + sums + own, log_sum(top, mass), mask=in_rows)


def can_run(q_rope: torch.Tensor, q_nope: torch.Tensor, ups: Sequence[Up], stored: Rebuilt) -> bool:
    """Whether the kernel takes these tensors: latents stored as they are or as bytes, in a dtype it knows."""
    return not isinstance(stored.stored, Paged) and can_take(q_rope, q_nope, ups, stored.stored)


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
    """Attention over latents, as `cpu_decode.decode`."""
    angles, held = stored.angles, stored.stored
    return _decode(
        q_rope,
        q_nope,
        [up.weight for up in stored.ups],
        [up.bias for up in stored.ups if up.bias is not None],
        scaling,
        unpacked(held)[0] if isinstance(held, PackedTokens) else stored.latents(),
        angles.cos,
        angles.sin,
        angles.pairs,
        visual if len(ups) == 2 else None,
        mask,
        filled,
    )


@torch.library.custom_op("mha2mla_vlm::rotated_decode", mutates_args=())
def _decode(
    q_rope: torch.Tensor,
    q_nope: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    scaling: float,
    latent: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pairs: torch.Tensor,
    visual: torch.Tensor | None,
    mask: torch.Tensor | None,
    filled: torch.Tensor | None,
) -> torch.Tensor:
    """Outputs `[B, T, H, D]` of queries `[B, H, T, R]` and `[B, H, T, N]` over latents `[B, S, r]`, with
    rotary tables `[B or 1, S, D]` of tokens and the `pairs [G, C]` of each KV head.
    """
    (batch, heads, new, rope_dim), kv_heads = q_rope.shape, len(pairs)
    ups = UpParts(weights, biases, kv_heads, rope_dim + q_nope.shape[-1])
    kinds, head_rows, rank, total = len(weights), heads // kv_heads * new, ups.rank, latent.shape[1]
    mask, latent, q_rope = row_mask(mask, batch), rows_dense(latent), rows_dense(q_rope)
    cos, sin = (rows_dense(x).expand(batch, -1, -1) for x in (cos, sin))
    q_latent, constant = absorbed(q_nope, ups, rope_dim) if q_nope.shape[-1] else (None, None)
    of_latent, step = in_units(rank, *latent.stride()[:2])
    of_tables, half_step = in_units(rope_dim // 2, *cos.stride()[:2], *sin.stride()[:2])
    size, launch = _sizes(head_rows, rank, rope_dim // 2, latent.itemsize)
    blocks = kv_heads * triton.cdiv(head_rows, size["ROWS"])
    split = split_tokens(total, size["TILE"], batch * blocks, LEAST_TILES, latent.device)
    splits = triton.cdiv(total, split)
    mixed = latent.new_empty(batch, splits, heads * new * kinds, rank)
    lse = latent.new_empty(batch, splits, heads * new * kinds, dtype=torch.float32)
    _split_kernel[(splits, blocks, batch)](
        q_rope, q_latent, constant, latent, *ups.ends(), cos, sin, pairs, visual, mask, filled, mixed, lse,
        scaling * LOG2_E,
        kv_heads, head_rows, new, total, of_latent[0], of_tables[0], ups.head_rows, split,
        *q_rope.stride()[:3], *of_latent[1:], *of_tables[1:3], *row_strides(visual, mask, filled),
        MASK=mask_kind(mask), FILLED=filled is not None, CONSTANT=constant is not None,
        NOPE=q_latent is not None, BIAS=bool(biases), PAIRS=rope_dim < cos.shape[-1],
        VISUAL=visual is not None, KINDS=kinds, **size, ALIGN=step,
        HALF_ALIGN=half_step, SPAN=SPAN, **launch,
    )  # fmt: skip
    return merged(mixed, lse, ups, heads, new)


@_decode.register_fake
def _(q_rope, q_nope, weights, biases, scaling, latent, cos, sin, pairs, visual, mask, filled):
    batch, heads, new, rope_dim = q_rope.shape
    return q_rope.new_empty(batch, new, heads, rope_dim + q_nope.shape[-1])


def _sizes(head_rows: int, rank: int, half: int, itemsize: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Query rows of a program, tokens of a tile, parts in which latents make keys (0: whole); and warps."""
    most, side = power(rank), power(half)
    up, part = 2 * side * most * itemsize, 0
    if up > MOST_UP:
        up, part = (4 * side + 2 * TILES[0][0]) * PART * itemsize, PART
    rows = min(power(head_rows), 64 if most <= 512 else LEAST)
    whole = MOST_SHARED if itemsize < 4 else MOST_SHARED // 2
    twice = [(*TILES[1], whole // 2)]  # two programs on a multiprocessor, each with tiles on their way
    for tile, stages, room in (*twice, (64, 1, whole), *((*tile, whole) for tile in TILES[3:])):
        if up + tile * (stages * (most + 2 * side) + rows) * itemsize <= room:
            break
    size = {"ROWS": rows, "TILE": tile, "RANK": most, "HALF": side, "PART": part}
    return size, {"num_warps": 8 if most > 512 else 4, "num_stages": stages}
