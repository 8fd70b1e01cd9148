"""What the Triton kernels have in common: reading tiles of tokens, the softmax over them, and merging splits.

The cache is split along its tokens, so that a GPU is full whatever the batch. What splits found is merged by
their log-sum-exp, modality by modality, for each has its own value up projection, which follows at once.

Shapes: B batch, T new tokens, S all tokens, H query heads, G KV heads, D head dim, r latent dims, K
modalities, P splits; Q = H * T rows, ordered by head and token, and Q * K sums, ordered by row and modality.
Logarithms are to the base of 2.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LEAST = 16  # what a side of `tl.dot` must have
MOST_SPLITS = 512
MOST_SHARED = 224 * 1024  # bytes of a multiprocessor's memory that a program may take
NO_MASK, BOOL_MASK, ADDED_MASK = 0, 1, 2
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2_E = 1.4426950408889634


@triton.jit
def read(start, at, column, in_rows, in_columns):
    """Rows that begin `at` some places, and columns of them, 0 outside."""
    return tl.load(
        start + at[:, None] + column[None, :], mask=in_rows[:, None] & in_columns[None, :], other=0.0
    )


@triton.jit
def masked(scores, shown, cell, MASK: tl.constexpr):
    """Scores with a mask's cells applied, and what is not `shown` at minus infinity."""
    if MASK == 1:
        shown = shown & (tl.load(cell, mask=shown, other=0) != 0)
    elif MASK == 2:
        scores += tl.load(cell, mask=shown, other=0.0).to(tl.float32) * 1.4426950408889634  # LOG2_E
    return tl.where(shown, scores, float("-inf"))


@triton.jit
def flags_of(visual, place, s, stop, VISUAL: tl.constexpr):
    """Whether tokens `s` before `stop` are visual, 1 or 0."""
    flags = s * 0
    if VISUAL:
        flags = tl.load(visual + place + s, mask=s < stop, other=0).to(tl.int32)
    return flags


@triton.jit
def as_finite(top):
    """Highest scores, 0 where nothing is shown."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def softmax_step(scores, top, TOKENS: tl.constexpr):
    """With scores of more tokens, along the axis `TOKENS`: the highest, their weights, and what sums over the
    tokens before are multiplied by.
    """
    highest = tl.maximum(top, tl.max(scores, TOKENS))
    finite = as_finite(highest)
    return highest, tl.exp2(scores - tl.expand_dims(finite, TOKENS)), tl.exp2(top - finite)


@triton.jit
def log_sum(top, mass):
    """Logarithms of sums of exponentials, from the highest scores and the masses relative to these."""
    return tl.where(mass > 0, top + tl.log2(tl.where(mass > 0, mass, 1.0)), float("-inf"))


@triton.jit
def _merge_kernel(mixed, lse, latent, mass, sums, rank, splits,
    RANK: tl.constexpr, STEP: tl.constexpr, ALIGN: tl.constexpr, KINDS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    batch, one, block = tl.program_id(2).to(tl.int64), tl.program_id(0), tl.program_id(1)
    rank = rank * ALIGN
    dim, part = block * RANK + tl.arange(0, RANK), tl.arange(0, PARTS)
    row = one // KINDS * KINDS
    logs, shares = lse + batch * splits * sums, mixed + (batch * splits * sums + one) * rank
    own = tl.load(
        logs + row + part // KINDS * sums + part % KINDS, mask=part < splits * KINDS, other=float("-inf")
    )
    top = as_finite(tl.max(own, 0))
    total = tl.sum(tl.exp2(own - top), 0)
    total = tl.where(total > 0, total, 1.0)
    acc, weight = tl.zeros([RANK], tl.float32), tl.zeros([STEP], tl.float32)
    for first in range(0, splits, STEP):
        split = first + tl.arange(0, STEP)
        log = tl.load(logs + one + split * sums, mask=split < splits, other=float("-inf"))
        share = tl.exp2(log - top) / total
        # nothing was written for a modality that a split lacks
        found = read(shares, split * sums * rank, dim, log > float("-inf"), dim < rank)
        acc += tl.sum(share[:, None] * found.to(tl.float32), 0)
        weight += share
    at = batch * sums + one
    tl.store(latent + at * rank + dim, acc.to(latent.dtype.element_ty), mask=dim < rank)
    if block == 0:
        tl.store(mass + at, tl.sum(weight, 0))


@triton.jit
def _expand_kernel(
    latent, mass, weight, last_weight, bias, last_bias, output,
    head_rows, new, rank, head_dim, head_up, value_at, row_group, output_b, output_t, output_h,
    BIAS: tl.constexpr, KINDS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    batch, group, block = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0)
    rank = rank * ALIGN
    d, inner = block * DIM + tl.arange(0, DIM), tl.arange(0, STEP)
    in_dim, value = d < head_dim, group * head_up + value_at + d
    rows = tl.num_programs(1) * head_rows
    for begin in range(0, head_rows, ROWS):
        inside = begin + tl.arange(0, ROWS)
        in_rows, row = inside < head_rows, group * head_rows + inside
        result = tl.zeros([ROWS, DIM], tl.float32)
        for kind in tl.static_range(KINDS):
            up = weight if kind == 0 else last_weight
            one = row * KINDS + kind
            for first in range(0, rank, STEP):
                dim = first + inner
                sums = read(latent + batch * rows * KINDS * rank, one * rank, dim, in_rows, dim < rank)
                values = read(up, value * rank, dim, in_dim, dim < rank)
                result = tl.dot(sums, tl.trans(values), result, input_precision="ieee")
            if BIAS:
                shift = tl.load((bias if kind == 0 else last_bias) + value, mask=in_dim, other=0.0)
                share = tl.load(mass + batch * rows * KINDS + one, mask=in_rows, other=0.0)
                result += share[:, None] * shift.to(tl.float32)[None, :]
        head = group * row_group + inside // new
        cells = batch * output_b + (inside % new) * output_t + head * output_h
        cells = output + cells[:, None] + d[None, :]
        tl.store(cells, result.to(output.dtype.element_ty), mask=in_rows[:, None] & in_dim[None, :])


class UpParts(NamedTuple):
    """`kv_b_proj` of each modality as kernels take it: dense weights `[G*(R+N+D), r]`, and biases or none."""

    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
    kv_heads: int
    before_values: int  # rows of a KV head

    @property
    def rank(self) -> int:
        """r."""
        return self.weights[0].shape[1]

    @property
    def head_rows(self) -> int:
        """Rows of a KV head."""
        return self.weights[0].shape[0] // self.kv_heads

    @property
    def head_dim(self) -> int:
        """D."""
        return self.head_rows - self.before_values

    def ends(self) -> tuple[torch.Tensor | None, ...]:
        """First and last weight, first and last bias."""
        none = [None]
        return (
            *self.weights[:1],
            *self.weights[-1:],
            *(self.biases[:1] or none),
            *(self.biases[-1:] or none),
        )


def merged(mixed: torch.Tensor, lse: torch.Tensor, ups: UpParts, heads: int, new: int) -> torch.Tensor:
    """Outputs `[B, T, H, D]` of what splits found: shares `[B, P, Q*K, r]` of their masses `[B, P, Q*K]`."""
    batch, splits, sums, rank = mixed.shape
    kinds, wide, head_rows = len(ups.weights), min(power(rank), 128), heads // ups.kv_heads * new
    (units,), unit = in_units(rank)
    latent, mass = mixed.new_empty(batch, sums, rank), lse.new_empty(batch, sums)
    _merge_kernel[(sums, triton.cdiv(rank, wide), batch)](
        mixed, lse, latent, mass, sums, units, splits,
        RANK=wide, STEP=min(power(splits), 64), ALIGN=unit, KINDS=kinds, PARTS=power(splits * kinds),
    )  # fmt: skip
    output = mixed.new_empty(batch, new, heads, ups.head_dim)
    dim = min(power(ups.head_dim), 32)
    _expand_kernel[(triton.cdiv(ups.head_dim, dim), ups.kv_heads, batch)](
        latent, mass, *ups.ends(), output,
        head_rows, new, units, ups.head_dim, ups.head_rows, ups.before_values, heads // ups.kv_heads,
        *output.stride()[:3], BIAS=bool(ups.biases), KINDS=kinds, ROWS=min(power(head_rows), 64), DIM=dim,
        STEP=128, ALIGN=unit, num_stages=3,
    )  # fmt: skip
    return output


def split_tokens(total: int, tile: int, programs: int, least: int, device: torch.device) -> int:
    """Tokens of a split, a multiple of a tile's, so that `programs` a split fill a GPU twice.

    Splits of less than `least` tiles are not worth more than filling it once.
    """
    wanted = max(1, min(2 * _processors(device) // programs, MOST_SPLITS))
    tiles = triton.cdiv(total, tile)
    each = max(triton.cdiv(tiles, wanted), min(triton.cdiv(2 * tiles, wanted), least))
    return tile * each


def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; those of an H200 where the kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def in_units(*sizes: int) -> tuple[list[int], int]:
    """Sizes in units of the power of two, up to 16, that divides all, and that unit.

    A compiler that sees them multiplied again knows how addresses are aligned, and reads 16 bytes at once.
    """
    unit = next(power for power in (16, 8, 4, 2, 1) if all(size % power == 0 for size in sizes))
    return [size // unit for size in sizes], unit


def power(size: int) -> int:
    """The side of a block of tensors that holds `size`."""
    return max(LEAST, triton.next_power_of_2(size))


def rows_dense(x: torch.Tensor) -> torch.Tensor:
    """The same numbers with the last dim dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def row_mask(mask: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """A mask over scores as `[B, T, S]`, without copying where it is the same for all rows of a batch."""
    if mask is None:
        return None
    flat = mask[:, 0] if mask.ndim == 4 else mask
    return rows_dense(flat).expand(batch, -1, -1)


def mask_kind(mask: torch.Tensor | None) -> int:
    """What a kernel is compiled for."""
    if mask is None:
        return NO_MASK
    return BOOL_MASK if mask.dtype == torch.bool else ADDED_MASK


def row_strides(
    visual: torch.Tensor | None, mask: torch.Tensor | None, filled: torch.Tensor | None
) -> tuple[int, ...]:
    """Steps of a row of `visual`, of a row and a token of `mask`, and of a row of `filled`."""
    by_token = (0, 0) if mask is None else mask.stride()[:2]
    by_row = 0 if filled is None or filled.ndim == 0 else filled.stride(0)
    return (0 if visual is None else visual.stride(0), *by_token, by_row)
