"""Attention over latents that lie in pages. Pure functions over tensors.

Where keys are rotated at read, `angles` are those of all tokens, whose tables need D / 2 columns only; None
elsewhere.

Shapes: n requests, T new tokens of one, S all its tokens, C numbers of a row, which begins with r + G * R, or
r where keys are rotated at read; H query heads, G KV heads, M = H / G, D head dim, R rope dims, r latent
dims; of a query's D numbers the first R are rotated.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional

from mha2mla_vlm.model.absorbed import Piece, Up, absorb_limit
from mha2mla_vlm.model.cache.latent import Pieces
from mha2mla_vlm.model.cache.pages import Paged, as_piece
from mha2mla_vlm.model.decoding import attend_latents
from mha2mla_vlm.model.kernels import find_kernel
from mha2mla_vlm.model.modality import Kind, Run
from mha2mla_vlm.model.rebuilt import Angles, Rebuilt
from mha2mla_vlm.model.rope import rotate
from mha2mla_vlm.model.softmax import RunningSoftmax
from mha2mla_vlm.utils.compat import flash_with_mass

CHUNK = 8192  # earlier tokens whose keys and values are made at a time


def decode(
    query: torch.Tensor,
    stored: Paged,
    visual: torch.Tensor | None,
    ups: Sequence[Up],
    scaling: float,
    angles: Angles | None = None,
) -> torch.Tensor:
    """Attention of one new token of each request, `query [n, H, D]`, over its tokens; `[n, H, D]`.

    `visual [n, P * N]` is their modality (`Paged.visual`), None for one modality.
    """
    q_rope, q_nope = _parts(query[:, :, None], ups)
    held = stored if angles is None else Rebuilt(stored, ups, _runs(stored.room, visual), visual, angles)
    kernel = find_kernel("auto", q_rope, q_nope, ups, held, None)
    if kernel is not None:
        return kernel(q_rope, q_nope, ups, scaling, held, visual, None)[:, 0]
    seen = torch.arange(stored.room, device=query.device) < stored.lengths[:, None]
    as_bytes = angles is not None and stored.packed is not None
    copied = stored.latent_bytes() if as_bytes else _piece(stored.rows(), ups, angles)
    given = (stored.room, visual, seen[:, None, None], ups, scaling, angles)
    return _absorbed(query[:, :, None], copied, *given)[:, 0]


def prefill(
    query: torch.Tensor,
    rows: torch.Tensor,
    visual: torch.Tensor | None,
    ups: Sequence[Up],
    scaling: float,
    angles: Angles | None = None,
) -> torch.Tensor:
    """Causal attention of a request's last tokens, `query [T, H, D]`, over all its rows; `[T, H, D]`.

    `visual [S]` is the modality of the `rows [S, C]`, None for one modality.
    """
    (new, heads, head_dim), past = query.shape, len(rows) - len(query)
    queries = query.transpose(0, 1)[None]
    if past and new <= absorb_limit(heads, ups[0].kv_heads, ups[0].nope_dim, head_dim):
        causal = torch.ones(new, len(rows), dtype=torch.bool, device=rows.device).tril(past)
        which = None if visual is None else visual[None]
        given = (len(rows), which, causal[None, None], ups, scaling, angles)
        return _absorbed(queries, _piece(rows[None], ups, angles), *given)[0]
    keys, values = keys_and_values(rows, visual, ups, past, len(rows), angles)
    if not past:
        output = functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scaling, enable_gqa=True
        )
        return output[0].transpose(0, 1)
    keys, values = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (keys, values))
    running, (output, lse) = RunningSoftmax(), flash_with_mass(queries, keys, values, scaling, causal=True)
    running.add((output,), lse[..., None])
    folded = queries.reshape(1, ups[0].kv_heads, -1, head_dim)  # all see all that is past: heads share keys
    for start in range(0, past, CHUNK):
        keys, values = keys_and_values(rows, visual, ups, start, min(start + CHUNK, past), angles)
        part, part_lse = flash_with_mass(folded, keys, values, scaling, causal=False)
        running.add((part.reshape(output.shape),), part_lse.reshape(*lse.shape, 1))
    (output,) = running.result()
    return output[0].transpose(0, 1).to(query.dtype)


def keys_and_values(
    rows: torch.Tensor,
    visual: torch.Tensor | None,
    ups: Sequence[Up],
    start: int,
    stop: int,
    angles: Angles | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[1, G, n, D]` of the n tokens from `start` to `stop` of `rows [S, C]`."""
    (latent,), k_rope = _piece(rows[None, start:stop], ups, angles)
    made = [functional.linear(latent, up.weight, up.bias) for up in ups]
    both = made[0] if visual is None else torch.where(visual[start:stop, None], made[1], made[0])
    both = both.view(1, len(latent), ups[0].kv_heads, -1).transpose(1, 2)
    if angles is not None:
        k_rope, both = both.tensor_split([ups[0].rope_dim], dim=-1)
        k_rope = rotate(k_rope, *angles.columns(start, stop))
    k_nope, values = both.tensor_split([ups[0].nope_dim], dim=-1)
    return torch.cat([k_rope, k_nope], dim=-1), values


def _parts(queries: torch.Tensor, ups: Sequence[Up]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated and other numbers of queries `[.., D]`."""
    rope, nope = queries.tensor_split([queries.shape[-1] - ups[0].nope_dim], dim=-1)
    return rope, nope


def _piece(rows: torch.Tensor, ups: Sequence[Up], angles: Angles | None) -> Piece:
    """What is stored in `rows [n, S, C]`: where keys are rotated at read, those of no dims."""
    rank, kv_heads = ups[0].weight.shape[-1], ups[0].kv_heads
    if angles is None:
        return as_piece(rows, rank, kv_heads)
    return rows[..., :rank], rows.new_empty(len(rows), kv_heads, rows.shape[1], 0)


def _runs(total: int, visual: torch.Tensor | None) -> tuple[Run, ...]:
    """One of all tokens."""
    return (Run(0, total, Kind.TEXT if visual is None else Kind.MIXED),)


def _absorbed(
    queries: torch.Tensor,
    held: Piece | Pieces,
    total: int,
    visual: torch.Tensor | None,
    mask: torch.Tensor,
    ups: Sequence[Up],
    scaling: float,
    angles: Angles | None,
) -> torch.Tensor:
    """Attention of `queries [n, H, T, D]` over `total` tokens that are `held`; `[n, T, H, D]`."""
    q_rope, q_nope = _parts(queries, ups)
    runs = _runs(total, visual)
    stored = held if angles is None else Rebuilt(held, ups, runs, visual, angles)
    return attend_latents("auto", q_rope, q_nope, ups, scaling, stored, runs, visual, mask)
