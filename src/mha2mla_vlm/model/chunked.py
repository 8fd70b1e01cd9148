"""Expanded attention with the keys and values of one chunk of tokens in memory at a time.

Shapes: B batch, T new tokens, S all tokens, H query heads, G KV heads, M = H / G, D head dim.
"""

from collections.abc import Iterable

import torch

from mha2mla_vlm.model.absorbed import masked

QUERY_BLOCK = 256  # new tokens that meet a chunk at a time


def attend_chunks(
    queries: torch.Tensor,
    chunks: Iterable[tuple[torch.Tensor, torch.Tensor]],
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attention of `queries [B, H, T, D]` over chunks of keys and values `[B, G, n, D]`; `[B, T, H, D]`.

    `mask` is a `dense_mask` over all tokens. Softmax is accumulated over chunks in float32, as in
    online softmax.
    """
    top = queries.new_full((*queries.shape[:3], 1), -torch.inf, dtype=torch.float32)
    mass, output = torch.zeros_like(top), torch.zeros(queries.shape, device=queries.device)
    start = 0
    for keys, values in chunks:
        stop = start + keys.shape[2]
        for first in range(0, queries.shape[2], QUERY_BLOCK):
            rows = slice(first, first + QUERY_BLOCK)
            seen = None if mask is None else mask[..., rows, start:stop]
            part, part_mass, part_top = _softmax_part(queries[:, :, rows], keys, values, seen, scaling)
            new_top = torch.maximum(top[:, :, rows], part_top)
            old, fresh = (top[:, :, rows] - new_top).exp(), (part_top - new_top).exp()
            output[:, :, rows] = output[:, :, rows] * old + part * fresh
            mass[:, :, rows] = mass[:, :, rows] * old + part_mass * fresh
            top[:, :, rows] = new_top
        start = stop
    return (output / mass).to(queries.dtype).transpose(1, 2)


def _softmax_part(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values summed under unnormalised weights `[B, H, T, D]`, and sum and maximum `[B, H, T, 1]`."""
    batch, heads, new, dim = queries.shape
    grouped = (batch, keys.shape[1], heads // keys.shape[1] * new)
    scores = queries.reshape(*grouped, dim) @ keys.transpose(-1, -2)
    scores = masked(scores.view(batch, heads, new, -1).float() * scaling, mask)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    output = weights.to(values.dtype).view(*grouped, -1) @ values
    return output.view(batch, heads, new, dim).float(), weights.sum(-1, keepdim=True), top
