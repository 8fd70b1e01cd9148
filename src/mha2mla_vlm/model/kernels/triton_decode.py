"""Flash decoding over latents in Triton; `absorbed.attend` is its specification.

The cache is split along its tokens. Each program takes the query rows of some KV heads over one split,
once for each modality that the split holds, with that modality's absorbed query; runs of tokens are
long, so nearly all splits hold one. A second kernel merges splits by their log-sum-exp and keeps
modalities apart, for each has its own value up projection.

Shapes: B batch, T new tokens, S all tokens, G KV heads, M query heads per KV head, R rope dims, r
latent dims, K modalities, P splits; Q = G * M * T rows, ordered by KV head, head in its group, token.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from mha2mla_vlm.model.absorbed import Piece, Queries, Sums, Up, absorb, expand
from mha2mla_vlm.model.cache.latent import Pieces
from mha2mla_vlm.model.cache.pages import Paged
from mha2mla_vlm.utils.compat import is_plain_tensor

LEAST = 16  # what a side of `tl.dot` must have
SPLIT_SIZES = (128, 4096)  # tokens of a split, least and most
PROGRAMS = 528  # that a split size aims at: four for each of 132 multiprocessors
NO_MASK, BOOL_MASK, ADDED_MASK = 0, 1, 2
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _read(start, at, column, in_rows, in_columns):
    """Rows that begin `at` some places, and columns of them, 0 outside."""
    return tl.load(
        start + at[:, None] + column[None, :], mask=in_rows[:, None] & in_columns[None, :], other=0.0
    )


@triton.jit
def _place(table, table_b, batch, s, seen, PAGE: tl.constexpr):
    """Where tokens `s` lie: row of the batch and token there or, in pages of PAGE tokens, page and token."""
    if PAGE == 0:
        first, second = batch + s * 0, s.to(tl.int64)
    else:
        first = tl.load(table + batch * table_b + s // PAGE, mask=seen, other=0).to(tl.int64)
        second = (s % PAGE).to(tl.int64)
    return first, second


@triton.jit
def _own_rope(q_rope, batch, row, rows, row_group, group, column, rope_dim, in_rows, in_keys):
    """Rotated query parts, each beside the keys of its own KV head, with 0 beside those of others."""
    own = (row[:, None] // row_group == group[None, :]) & in_rows[:, None]
    at = ((batch * rows + row) * rope_dim)[:, None] + (column % rope_dim)[None, :]
    return tl.load(q_rope + at, mask=own & in_keys[None, :], other=0.0)


@triton.jit
def _count_visual(visual, place, start, stop, VISUAL: tl.constexpr, SPLIT: tl.constexpr):
    """Visual tokens from `start` to `stop`."""
    inside = start + tl.arange(0, SPLIT)
    flags = tl.zeros([SPLIT], tl.int32)
    if VISUAL:
        flags = tl.load(visual + place + inside, mask=inside < stop, other=0).to(tl.int32)
    return tl.sum(flags)


@triton.jit
def _scores(query, tile, rope, keys, added):
    """Scores of a tile of tokens: what latents and what rotated keys give, and a constant of each row."""
    scores = tl.dot(query, tl.trans(tile), input_precision="ieee")
    scores += tl.dot(rope, tl.trans(keys), input_precision="ieee")
    return scores + added[:, None]


@triton.jit
def _masked(scores, shown, cell, MASK: tl.constexpr):
    """Scores with a mask's cells applied, and what is not `shown` at minus infinity."""
    if MASK == 1:
        shown = shown & (tl.load(cell, mask=shown, other=0) != 0)
    elif MASK == 2:
        scores += tl.load(cell, mask=shown, other=0.0).to(tl.float32)
    return tl.where(shown, scores, float("-inf"))


@triton.jit
def _add_tile(top, mass, acc, scores, tile):
    """Softmax sums so far, with a tile of tokens added: highest score, mass, and sums `[rows, r]`."""
    highest = tl.maximum(top, tl.max(scores, 1))
    finite = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp(scores - finite[:, None])
    rescale = tl.exp(top - finite)
    mass = mass * rescale + tl.sum(weights, 1)
    acc = acc * rescale[:, None] + tl.dot(weights.to(tile.dtype), tile, input_precision="ieee")
    return highest, mass, acc


@triton.jit
def _write_shares(mixed, at, dim, rank, top, mass, acc, in_rows, in_rank):
    """Write sums as shares of their mass, rows `at`; returns the log of that mass."""
    safe = tl.where(mass > 0, mass, 1.0)
    cells = mixed + (at * rank)[:, None] + dim[None, :]
    tl.store(cells, acc / safe[:, None], mask=in_rows[:, None] & in_rank[None, :])
    return tl.where(mass > 0, top + tl.log(safe), float("-inf"))


@triton.jit
def _split_kernel(
    q_rope, q_latent, constant, latent, k_rope, visual, mask, filled, table, mixed, lse,
    rows, row_group, new, total, rank, rope_dim, splits,
    latent_b, latent_s, key_b, key_g, key_s, visual_b, mask_b, mask_t, filled_b, table_b,
    MASK: tl.constexpr, FILLED: tl.constexpr, CONSTANT: tl.constexpr, VISUAL: tl.constexpr,
    KINDS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
    RANK: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    batch, split, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    start = split * SPLIT
    stop = tl.minimum(start + SPLIT, total)
    if FILLED:
        stop = tl.minimum(stop, tl.load(filled + batch * filled_b).to(tl.int32))
    row = block * ROWS + tl.arange(0, ROWS)
    dim, column = tl.arange(0, RANK), tl.arange(0, ROPE)
    in_rows, in_rank = row < rows, dim < rank
    # rotated keys of the groups that these rows belong to, side by side; a row meets those of its own
    group = block * ROWS // row_group + column // rope_dim
    in_keys = group * row_group < tl.minimum(rows, (block + 1) * ROWS)
    rope = _own_rope(q_rope, batch, row, rows, row_group, group, column, rope_dim, in_rows, in_keys)
    key_at = group.to(tl.int64) * key_g + column % rope_dim
    mask_row = row[:, None]  # not looked at where there is no mask
    if MASK != 0:
        mask_row = mask + batch * mask_b + (row % new)[:, None] * mask_t
    count = _count_visual(visual, batch * visual_b, start, stop, VISUAL, SPLIT)
    for kind in tl.static_range(KINDS):
        present = (count > 0) if kind == 1 else (count < stop - start)
        here = (batch * splits + split) * KINDS + kind
        top, mass = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, RANK], tl.float32)
        if present:
            at = ((kind * tl.num_programs(0) + batch) * rows + row) * rank
            query = _read(q_latent, at, dim, in_rows, in_rank)
            added = tl.zeros([ROWS], tl.float32)
            if CONSTANT and kind == 0:
                added = tl.load(constant + batch * rows + row, mask=in_rows, other=0.0).to(tl.float32)
            for first in range(start, stop, TILE):
                s = first + tl.arange(0, TILE)
                seen = s < stop
                b, t = _place(table, table_b, batch, s, seen, PAGE)
                tile = _read(latent, b * latent_b + t * latent_s, dim, seen, in_rank)
                keys = _read(k_rope, b * key_b + t * key_s, key_at, seen, in_keys)
                scores = _scores(query, tile, rope, keys, added)
                if VISUAL:
                    is_visual = tl.load(visual + batch * visual_b + s, mask=seen, other=0).to(tl.int32)
                    seen = seen & (is_visual == kind)
                scores = _masked(scores, seen[None, :] & in_rows[:, None], mask_row + s[None, :], MASK)
                top, mass, acc = _add_tile(top, mass, acc, scores, tile)
            top = _write_shares(mixed, here * rows + row, dim, rank, top, mass, acc, in_rows, in_rank)
        tl.store(lse + here * rows + row, top, mask=in_rows)


@triton.jit
def _merge_kernel(
    mixed, lse, output, text_mass, rows, rank, splits,
    KINDS: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    batch, row, kind = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    part, dim = tl.arange(0, PARTS), tl.arange(0, RANK)
    first = batch * splits * KINDS
    logs = tl.load(lse + (first + part) * rows + row, mask=part < splits * KINDS, other=float("-inf"))
    top = tl.max(logs, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    exps = tl.exp(logs - top)
    mass = tl.sum(exps, 0)
    mass = tl.where(mass > 0, mass, 1.0)
    acc = tl.zeros([RANK], tl.float32)
    for split in range(splits):
        here = first + split * KINDS + kind
        weight = tl.exp(tl.load(lse + here * rows + row) - top) / mass + tl.zeros([RANK], tl.float32)
        used = (dim < rank) & (weight > 0)  # nothing was written for a modality that a split lacks
        values = tl.load(mixed + (here * rows + row) * rank + dim, mask=used, other=0.0)
        acc += weight * values
    at = (kind * tl.num_programs(0) + batch) * rows + row
    tl.store(output + at * rank + dim, acc.to(output.dtype.element_ty), mask=dim < rank)
    if kind == 0:
        text = tl.sum(tl.where(part % KINDS == 0, exps, 0.0), 0) / mass
        tl.store(text_mass + batch * rows + row, text.to(text_mass.dtype.element_ty))


def can_run(
    q_rope: torch.Tensor, q_nope: torch.Tensor, ups: Sequence[Up], stored: Piece | Pieces | Paged
) -> bool:
    """Whether the kernels take these tensors: stored as they are, in a dtype that they know."""
    if isinstance(stored, Pieces):
        return False
    numbers = (stored.pages,) if isinstance(stored, Paged) else stored
    tensors = (q_rope, q_nope, *numbers, *(up.weight for up in ups))
    known = all(x.dtype == q_rope.dtype and x.dtype in DTYPES for x in tensors)
    return known and all(map(is_plain_tensor, tensors))


def decode(
    q_rope: torch.Tensor,
    q_nope: torch.Tensor,
    ups: Sequence[Up],
    scaling: float,
    stored: Piece | Paged,
    visual: torch.Tensor | None,
    mask: torch.Tensor | None,
    filled: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over latents, as `cpu_decode.decode`; the up projections are PyTorch's."""
    queries = absorb(q_rope, q_nope, ups, scaling)
    return expand(attend(queries, stored, visual, mask, filled), ups, q_rope.shape[2])


def attend(
    queries: Queries,
    stored: Piece | Paged,
    visual: torch.Tensor | None,
    mask: torch.Tensor | None,
    filled: torch.Tensor | None = None,
) -> Sums:
    """`absorbed.attend` over tokens whose modality is `visual [B, S]` (None: one modality).

    `filled` is how many of the S tokens there are, if a mask hides the others: they are not read.
    """
    table = None
    if isinstance(stored, Paged):
        table, filled, stored = stored.table, stored.lengths, stored.views()
    output, text_mass = _decode(
        queries.rope.contiguous(),
        torch.stack(queries.latent),
        queries.text_constant,
        *stored,
        visual,
        mask,
        filled,
        table,
    )
    return as_sums(output, text_mass)


def as_sums(output: torch.Tensor, text_mass: torch.Tensor) -> Sums:
    """What `merged` gives, by modality."""
    return Sums(tuple(output), None if len(output) == 1 else text_mass)


@torch.library.custom_op("mha2mla_vlm::latent_decode", mutates_args=())
def _decode(
    q_rope: torch.Tensor,
    q_latent: torch.Tensor,
    constant: torch.Tensor | None,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    visual: torch.Tensor | None,
    mask: torch.Tensor | None,
    filled: torch.Tensor | None,
    table: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed latents `[K, B, Q, r]` and the weight of text tokens `[B, Q, 1]`.

    With a `table [B, pages]` latents and keys are those of all pages, `filled [B]` tokens of each row.
    """
    kinds, batch, rows, rank = q_latent.shape
    groups, row_group, rope_dim = q_rope.shape[1:]
    page, table_b = (0, 0) if table is None else (latent.shape[1], table.stride(0))
    total, mask = table.shape[1] * page if table is not None else latent.shape[1], _row_mask(mask, batch)
    new = 1 if mask is None else mask.shape[1]
    block_rows, tile = _tile(rows, rank)
    blocks = triton.cdiv(rows, block_rows)
    split = split_size(total, batch * blocks)
    splits = triton.cdiv(total, split)
    k_rope, latent = _rows_dense(k_rope), _rows_dense(latent)
    mixed = latent.new_empty(batch, splits, kinds, rows, rank, dtype=torch.float32)
    lse = latent.new_empty(batch, splits, kinds, rows, dtype=torch.float32)
    met_groups = min(groups, (block_rows - 1) // row_group + 2)
    _split_kernel[(batch, splits, blocks)](
        q_rope, q_latent, constant, latent, k_rope, visual, mask, filled, table, mixed, lse,
        rows, row_group, new, total, rank, rope_dim, splits,
        *latent.stride()[:2], *k_rope.stride()[:3], 0 if visual is None else visual.stride(0),
        *((0, 0) if mask is None else mask.stride()[:2]),
        0 if filled is None or filled.ndim == 0 else filled.stride(0), table_b,
        MASK=_mask_kind(mask), FILLED=filled is not None, CONSTANT=constant is not None,
        VISUAL=visual is not None, KINDS=kinds, ROWS=block_rows, TILE=tile, SPLIT=split,
        RANK=_power(rank), ROPE=_power(met_groups * rope_dim), PAGE=page,
        **_launch(rank),
    )  # fmt: skip
    return merged(mixed, lse, latent.dtype)


def merged(mixed: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums `[K, B, Q, r]` and the weight of text tokens `[B, Q, 1]`, of splits `[B, P, K, Q, r]`."""
    batch, splits, kinds, rows, rank = mixed.shape
    output = mixed.new_empty(kinds, batch, rows, rank, dtype=dtype)
    text_mass = mixed.new_empty(batch, rows, 1, dtype=dtype)
    _merge_kernel[(batch, rows, kinds)](
        mixed, lse, output, text_mass, rows, rank, splits,
        KINDS=kinds, RANK=_power(rank), PARTS=_power(splits * kinds),
    )  # fmt: skip
    return output, text_mass


@_decode.register_fake
def _(q_rope, q_latent, constant, latent, k_rope, visual, mask, filled, table):
    _, batch, rows, _ = q_latent.shape
    return torch.empty_like(q_latent), latent.new_empty(batch, rows, 1)


def split_size(total: int, programs: int) -> int:
    """Tokens of a split, a power of two, so that `programs` a split fill a GPU."""
    least, most = SPLIT_SIZES
    wanted = max(total * programs // PROGRAMS, 1)
    return min(max(triton.next_power_of_2(wanted), least), most)


def _tile(rows: int, rank: int) -> tuple[int, int]:
    """Query rows and tokens of a tile, so that its sums stay in registers."""
    most = 32 if rank <= 512 else 16
    return min(_power(rows), most), 64 if rank <= 256 else 32 if rank <= 512 else 16


def _launch(rank: int) -> dict[str, int]:
    """Warps, so that sums fit registers, and tiles on their way, so that they fit shared memory."""
    return {"num_warps": 8 if rank > 128 else 4, "num_stages": 3 if rank <= 512 else 2}


def _power(size: int) -> int:
    return max(LEAST, triton.next_power_of_2(size))


def _rows_dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _row_mask(mask: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """A mask over scores as `[B, T, S]`, without copying where it is the same for all rows of a batch."""
    if mask is None:
        return None
    flat = mask[:, 0] if mask.ndim == 4 else mask
    return _rows_dense(flat).expand(batch, -1, -1)


def _mask_kind(mask: torch.Tensor | None) -> int:
    if mask is None:
        return NO_MASK
    return BOOL_MASK if mask.dtype == torch.bool else ADDED_MASK
