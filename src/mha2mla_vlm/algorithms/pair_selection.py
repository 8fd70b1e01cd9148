"""Partial RoPE: which frequency pairs of each KV head stay rotated. Pure functions over tensors.

Pair `i` of a head is dims `(i, i + D/2)`. Shapes: T tokens, H query heads, G KV heads, M = H / G, D
head dim, P = D / 2 pairs, R rope dims kept per head.
"""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True)
class RopeSelection:
    """Of one layer, the `pairs [G, R/2]` that stay rotated, and what the others fold to.

    `fold [G, 2, P]` holds a and b (`folding.fold_coefficients`).
    """

    pairs: torch.Tensor
    fold: torch.Tensor | None = None


def fixed_pairs(
    kind: Literal["high", "low", "uniform"], *, kv_heads: int, head_dim: int, rope_dim: int
) -> torch.Tensor:
    """Pairs that do not depend on data, `[G, R/2]`: the first, the last, or every D/R-th."""
    pairs, kept = head_dim // 2, rope_dim // 2
    chosen = {
        "high": torch.arange(kept),
        "low": torch.arange(pairs - kept, pairs),
        "uniform": torch.arange(kept) * pairs // kept,
    }[kind]
    return chosen.repeat(kv_heads, 1)


def top_pairs(scores: torch.Tensor, rope_dim: int) -> torch.Tensor:
    """The R/2 pairs of highest score of each KV head, ascending: `[G, P]` to `[G, R/2]`."""
    return scores.topk(rope_dim // 2, dim=-1).indices.sort(dim=-1).values


def _as_pairs(x: torch.Tensor) -> torch.Tensor:
    """`[.., D]` as `[.., P, 2]`."""
    return torch.stack(x.chunk(2, dim=-1), dim=-1)


def two_norm_scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Mean length of each pair in queries `[H, T, D]` times that in keys `[G, T, D]`: `[G, P]`.

    Summed over the group's query heads (arXiv 2502.14837, 2-norm). RoPE does not change lengths, so
    rotated and plain inputs give the same.
    """
    q_length = _as_pairs(queries.float()).norm(dim=-1).mean(1)
    k_length = _as_pairs(keys.float()).norm(dim=-1).mean(1)
    return q_length.view(len(keys), -1, q_length.shape[-1]).sum(1) * k_length


def pair_kl_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scaling: float,
    *,
    unrotated: tuple[torch.Tensor, torch.Tensor] | None = None,
    max_queries: int = 256,
) -> torch.Tensor:
    """KL divergence of attention from attention without a pair, for each pair: `[G, P]`.

    `queries [H, T, D]` and `keys [G, T, D]` are rotated; attention is causal. The mean is over
    queries (at most `max_queries`, evenly spread) and the group's query heads; with the part c of
    the logits that goes it is E_p[c] + log E_p[exp(-c)]. That part is the whole pair's
    (arXiv 2601.11464, section 3.1), or, given the `unrotated` queries and keys, only what its
    rotation adds: what conversion really takes away.
    """
    kv_heads, total, _ = keys.shape
    rows = torch.linspace(0, total - 1, min(total, max_queries), device=keys.device).round().long()
    hidden = torch.arange(total, device=keys.device) > rows[:, None]  # later tokens

    def parts_of(group: int, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        grouped = queries[:, rows].float().unflatten(0, (kv_heads, -1))[group]
        return torch.einsum("mtpc,spc->pmts", _as_pairs(grouped), _as_pairs(keys[group].float())) * scaling

    scores = torch.zeros(kv_heads, keys.shape[-1] // 2, device=keys.device)
    for group in range(kv_heads):
        parts = parts_of(group, queries, keys)
        logits = parts.sum(0).masked_fill(hidden, -torch.inf)
        if unrotated is not None:
            parts = parts - parts_of(group, *unrotated)
        weights, total_log = logits.softmax(-1), logits.logsumexp(-1)
        for pair, part in enumerate(parts):
            kl = (weights * part).sum(-1) + (logits - part).logsumexp(-1) - total_log
            scores[group, pair] = kl.mean()
    return scores


def split_dims(pairs: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dims of each KV head that stay rotated, `[G, R]` in half-split pair order, and the others, `[G, N]`."""
    rope = torch.cat([pairs, pairs + head_dim // 2], dim=-1)
    is_rope = torch.zeros(len(pairs), head_dim, dtype=torch.bool, device=pairs.device).scatter(1, rope, True)
    others = (~is_rope).nonzero()[:, 1].view(len(pairs), -1)
    return rope, others
