"""Expanded attention with the keys and values of one chunk of tokens in memory at a time.

Shapes: B batch, T new tokens, S all tokens, H query heads, G KV heads, M = H / G, D head dim.
"""

from collections.abc import Iterable

import torch

from mha2mla_vlm.model.absorbed import masked
from mha2mla_vlm.model.softmax import RunningSoftmax

QUERY_BLOCK = 256  # new tokens that meet a chunk at a time


def attend_chunks(
    queries: torch.Tensor,
    chunks: Iterable[tuple[torch.Tensor, torch.Tensor]],
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attention of `queries [B, H, T, D]` over chunks of keys and values `[B, G, n, D]`; `[B, T, H, D]`.

    `mask` is a `dense_mask` over all tokens.
    """
    blocks = range(0, queries.shape[2], QUERY_BLOCK)
    running, start = [RunningSoftmax() for _ in blocks], 0
    for keys, values in chunks:
        stop = start + keys.shape[2]
        for first, sums in zip(blocks, running, strict=True):
            rows = slice(first, first + QUERY_BLOCK)
            seen = None if mask is None else mask[..., rows, start:stop]
            output, mass, top = _softmax_part(queries[:, :, rows], keys, values, seen, scaling)
            sums.add((output,), top, mass)
        start = stop
    return torch.cat([sums.result()[0] for sums in running], dim=2).to(queries.dtype).transpose(1, 2)


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
