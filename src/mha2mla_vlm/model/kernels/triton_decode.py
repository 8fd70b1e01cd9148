"""Flash decoding over latents in Triton; `absorbed.attend` is its specification.

One kernel moves queries to where they meet latents, for each modality; one attends over a split of tokens,
with the queries of both modalities as rows of one product, each row seeing the tokens of its own. Two merge
splits and apply the value up projections (`triton_parts`).

Shapes: those of `triton_parts`; M = H / G query heads per KV head, R rope dims, N = D - R.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from mha2mla_vlm.model.absorbed import Piece, Up
from mha2mla_vlm.model.cache.latent import Pieces
from mha2mla_vlm.model.cache.packed import PackedTokens
from mha2mla_vlm.model.cache.pages import Paged
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

TILES = (64, 3), (64, 2), (32, 3), (32, 2), (16, 2), (16, 1)  # tokens, and tiles that are on their way
LEAST_TILES = 8  # of a split
RANK_STEP = 64  # latent dims that a program of the first kernel makes


@triton.jit
def _absorb_kernel(
    q_nope, weight, last_weight, bias, last_bias, q_latent, constant,
    head_rows, new, nope, rank, head_up, key_at, row_group, query_b, query_h, query_t,
    CONSTANT: tl.constexpr, KINDS: tl.constexpr, ROWS: tl.constexpr, NOPE: tl.constexpr, STEP: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    batch, group = tl.program_id(2).to(tl.int64), (tl.program_id(1) // KINDS).to(tl.int64)
    kind, block = tl.program_id(1) % KINDS, tl.program_id(0)
    rank = rank * ALIGN
    dim = block * STEP + tl.arange(0, STEP)
    n, in_rank = tl.arange(0, NOPE), dim < rank
    in_nope = n < nope
    rows = tl.num_programs(1) // KINDS * head_rows
    key = group * head_up + key_at + n
    up = weight if kind == 0 else last_weight
    keys = read(up, key * rank, dim, in_nope, in_rank)
    for first in range(0, head_rows, ROWS):
        inside = first + tl.arange(0, ROWS)
        in_rows = inside < head_rows
        query_at = (group * row_group + inside // new) * query_h + inside % new * query_t
        query = read(q_nope + batch * query_b, query_at, n, in_rows, in_nope)
        row = batch * rows + group * head_rows + inside
        made = tl.dot(query, keys, input_precision="ieee")
        cells = q_latent + ((row * KINDS + kind) * rank)[:, None] + dim[None, :]
        tl.store(cells, made.to(q_latent.dtype.element_ty), mask=in_rows[:, None] & in_rank[None, :])
        if CONSTANT and (kind == 0) & (block == 0):
            shift = tl.load(bias + key, mask=in_nope, other=0.0).to(tl.float32)
            shift -= tl.load(last_bias + key, mask=in_nope, other=0.0).to(tl.float32)
            tl.store(constant + row, tl.sum(query.to(tl.float32) * shift[None, :], 1), mask=in_rows)


@triton.jit
def _split_kernel(
    q_rope, q_latent, constant, latent, k_rope, visual, mask, filled, table, mixed, lse, scale,
    rows, row_group, new, total, rank, rope_dim, split_size, query_b, query_h, query_t,
    latent_b, latent_s, key_b, key_g, key_s, visual_b, mask_b, mask_t, filled_b, table_b,
    MASK: tl.constexpr, FILLED: tl.constexpr, CONSTANT: tl.constexpr, VISUAL: tl.constexpr,
    KINDS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
    PAGE: tl.constexpr, ALIGN: tl.constexpr, ROPE_ALIGN: tl.constexpr,
):  # fmt: skip
    batch, split, block = tl.program_id(2).to(tl.int64), tl.program_id(0), tl.program_id(1)
    rank, latent_b, latent_s = rank * ALIGN, latent_b * ALIGN, latent_s * ALIGN
    rope_dim, key_b, key_g = rope_dim * ROPE_ALIGN, key_b * ROPE_ALIGN, key_g * ROPE_ALIGN
    key_s = key_s * ROPE_ALIGN
    start = split * split_size
    stop = tl.minimum(start + split_size, total)
    if FILLED:
        stop = tl.minimum(stop, tl.load(filled + batch * filled_b).to(tl.int32))
    part = block * ROWS + tl.arange(0, ROWS)
    row, kind, in_rows = part // KINDS, part % KINDS, part < rows * KINDS
    dim, column = tl.arange(0, RANK), tl.arange(0, ROPE)
    in_rank = dim < rank
    query = read(q_latent + batch * rows * KINDS * rank, part * rank, dim, in_rows, in_rank)
    # rotated keys of the groups that these rows belong to, side by side; a row meets those of its own
    group = block * ROWS // KINDS // row_group + column // rope_dim
    in_keys = group * row_group < tl.minimum(rows, tl.cdiv((block + 1) * ROWS, KINDS))
    own = (row[:, None] // row_group == group[None, :]) & in_rows[:, None] & in_keys[None, :]
    rope_at = (row // new * query_h + row % new * query_t)[:, None] + (column % rope_dim)[None, :]
    rope = tl.load(q_rope + batch * query_b + rope_at, mask=own, other=0.0)
    key_at = group.to(tl.int64) * key_g + column % rope_dim
    near = tl.arange(0, TILE)
    added = tl.zeros([ROWS], tl.float32)
    if CONSTANT:
        added = tl.load(constant + batch * rows + row, mask=in_rows & (kind == 0), other=0.0) * scale
    mask_row = row[:, None]  # not looked at where there is no mask
    if MASK != 0:
        mask_row = mask + batch * mask_b + (row % new)[:, None] * mask_t
    top, mass = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, RANK], tl.float32)
    flags = flags_of(visual, batch * visual_b, start + near, stop, VISUAL)
    for first in range(start, stop, TILE):
        s, own_flags = first + near, flags
        flags = flags_of(visual, batch * visual_b, s + TILE, stop, VISUAL)  # of the next tile, ahead of time
        seen = s < stop
        if PAGE == 0:  # addresses of a tile are one of 64 bits and small steps from there
            here = batch * 0 + first  # of 64 bits
            tile = read(latent + batch * latent_b + here * latent_s, near * latent_s, dim, seen, in_rank)
            keys = read(k_rope + batch * key_b + here * key_s, near * key_s, key_at, seen, in_keys)
        else:
            page = tl.load(table + batch * table_b + s // PAGE, mask=seen, other=0).to(tl.int64)
            tile = read(latent, page * latent_b + (s % PAGE) * latent_s, dim, seen, in_rank)
            keys = read(k_rope, page * key_b + (s % PAGE) * key_s, key_at, seen, in_keys)
        scores = tl.dot(query, tl.trans(tile), input_precision="ieee")
        scores = tl.dot(rope, tl.trans(keys), scores, input_precision="ieee") * scale + added[:, None]
        shown = seen[None, :] & in_rows[:, None]
        if VISUAL:
            shown = shown & (own_flags[None, :] == kind[:, None])
        scores = masked(scores, shown, mask_row + s[None, :], MASK)
        top, weights, rescale = softmax_step(scores, top, 1)
        mass = mass * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(tile.dtype), tile, acc * rescale[:, None], input_precision="ieee")
    sums = (batch * tl.num_programs(0) + split) * rows * KINDS
    shares = acc / tl.where(mass > 0, mass, 1.0)[:, None]
    cells = mixed + sums * rank + (part * rank)[:, None] + dim[None, :]
    found = in_rows & (mass > 0)
    tl.store(cells, shares.to(mixed.dtype.element_ty), mask=found[:, None] & in_rank[None, :])
    tl.store(lse + sums + part, log_sum(top, mass), mask=in_rows)


def can_run(
    q_rope: torch.Tensor, q_nope: torch.Tensor, ups: Sequence[Up], stored: Piece | Pieces | Paged
) -> bool:
    """Whether the kernels take these tensors: stored as they are or as bytes, in a dtype that they know."""
    return can_take(q_rope, q_nope, ups, stored)


def decode(
    q_rope: torch.Tensor,
    q_nope: torch.Tensor,
    ups: Sequence[Up],
    scaling: float,
    stored: Piece | Paged | PackedTokens,
    visual: torch.Tensor | None,
    mask: torch.Tensor | None,
    filled: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over latents, as `cpu_decode.decode`; `stored` may also be rows of bytes."""
    table = None
    if isinstance(stored, PackedTokens):
        stored = unpacked(stored)
    if isinstance(stored, Paged):
        table, filled, stored = stored.table, stored.lengths, stored.views()
    return _decode(
        q_rope,
        q_nope,
        [up.weight for up in ups],
        [up.bias for up in ups if up.bias is not None],
        ups[0].kv_heads,
        scaling,
        *stored,
        visual if len(ups) == 2 else None,
        mask,
        filled,
        table,
    )


@torch.library.custom_op("mha2mla_vlm::latent_decode", mutates_args=())
def _decode(
    q_rope: torch.Tensor,
    q_nope: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    kv_heads: int,
    scaling: float,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    visual: torch.Tensor | None,
    mask: torch.Tensor | None,
    filled: torch.Tensor | None,
    table: torch.Tensor | None,
) -> torch.Tensor:
    """Outputs `[B, T, H, D]` of queries `[B, H, T, R]` and `[B, H, T, N]` over latents `[B, S, r]` and keys
    `[B, G, S, R]`. With a `table [B, pages]` these are those of all pages, `filled [B]` tokens of each row.
    """
    batch, heads, new, rope_dim = q_rope.shape
    ups = UpParts(weights, biases, kv_heads, q_nope.shape[-1])
    kinds, rows, rank = len(weights), heads * new, ups.rank
    page, table_b = (0, 0) if table is None else (latent.shape[1], table.stride(0))
    total, mask = table.shape[1] * page if table is not None else latent.shape[1], row_mask(mask, batch)
    k_rope, latent, q_rope = rows_dense(k_rope), rows_dense(latent), rows_dense(q_rope)
    q_latent, constant = absorbed(q_nope, ups)
    of_latent, step = in_units(rank, *latent.stride()[:2])
    of_keys, rope_step = in_units(rope_dim, *k_rope.stride()[:3])
    size, launch = _sizes(heads // kv_heads * new, kv_heads, kinds, rank, rope_dim, latent.itemsize)
    blocks = triton.cdiv(rows * kinds, size["ROWS"])
    split = split_tokens(total, size["TILE"], batch * blocks, LEAST_TILES, latent.device)
    splits = triton.cdiv(total, split)
    mixed = latent.new_empty(batch, splits, rows * kinds, rank)
    lse = latent.new_empty(batch, splits, rows * kinds, dtype=torch.float32)
    _split_kernel[(splits, blocks, batch)](
        q_rope, q_latent, constant, latent, k_rope, visual, mask, filled, table, mixed, lse, scaling * LOG2_E,
        rows, heads // kv_heads * new, new, total, of_latent[0], of_keys[0], split, *q_rope.stride()[:3],
        *of_latent[1:], *of_keys[1:], *row_strides(visual, mask, filled), table_b,
        MASK=mask_kind(mask), FILLED=filled is not None, CONSTANT=constant is not None,
        VISUAL=visual is not None, KINDS=kinds, PAGE=page, **size,
        ALIGN=step, ROPE_ALIGN=rope_step, **launch,
    )  # fmt: skip
    return merged(mixed, lse, ups, heads, new)


@_decode.register_fake
def _(q_rope, q_nope, weights, biases, kv_heads, scaling, latent, k_rope, visual, mask, filled, table):
    batch, heads, new, rope_dim = q_rope.shape
    return q_rope.new_empty(batch, new, heads, rope_dim + q_nope.shape[-1])


def absorbed(q_nope: torch.Tensor, ups: UpParts, key_at: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Queries `[B, Q, K, r]` that meet latents, of `q_nope [B, H, T, N]`, and what text gives more `[B, Q]`.

    `key_at` is the first row of unrotated keys of each KV head.
    """
    batch, heads, new, nope = q_nope.shape
    q_nope, kinds = rows_dense(q_nope), len(ups.weights)
    head_rows = heads // ups.kv_heads * new
    q_latent = q_nope.new_empty(batch, heads * new, kinds, ups.rank)
    constant = None
    if kinds == 2 and ups.biases:
        constant = q_nope.new_empty(batch, heads * new, dtype=torch.float32)
    (units,), step = in_units(ups.rank)
    _absorb_kernel[(triton.cdiv(ups.rank, RANK_STEP), ups.kv_heads * kinds, batch)](
        q_nope, *ups.ends(), q_latent, constant,
        head_rows, new, nope, units, ups.head_rows, key_at, heads // ups.kv_heads, *q_nope.stride()[:3],
        CONSTANT=constant is not None, KINDS=kinds, ROWS=min(power(head_rows), 64), NOPE=power(nope),
        STEP=RANK_STEP, ALIGN=step, num_warps=4,
    )  # fmt: skip
    return q_latent, constant


def _sizes(
    group_rows: int, kv_heads: int, kinds: int, rank: int, rope_dim: int, itemsize: int
) -> tuple[dict[str, int], dict[str, Any]]:
    """Rows of a program and tokens of a tile, so that sums fit registers and tiles shared memory; warps."""
    most, side = power(rank), power(group_rows * kv_heads * kinds)
    side = min(side, 64 if most <= 512 else 32 if most <= 1024 else 16)
    options = ((rows, *tile) for rows in (64, 32, LEAST) for tile in TILES if rows <= side)
    for rows, tile, stages in options:
        own, rest = divmod(triton.cdiv(rows, kinds), group_rows)
        met = min(kv_heads, own + 2 if rest else own)  # KV heads of a program's rows
        rope = power(met * rope_dim)
        if (stages * tile + rows) * (most + rope) * itemsize <= MOST_SHARED:
            break
    size = {"ROWS": rows, "TILE": tile, "RANK": most, "ROPE": rope}
    return size, {"num_warps": 8 if most > 256 else 4, "num_stages": stages}
