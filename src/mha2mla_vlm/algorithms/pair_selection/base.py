"""Partial RoPE: what a way to choose pairs is, and what all of them share. Pure functions over tensors.

Pair `i` of a head is dims `(i, i + D/2)`; where the original rotates only a part of them, P pairs are those.
Shapes: T tokens, H query heads, G KV heads, M = H / G, D head dim, P = D / 2 pairs, R rope dims kept per
head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Attended(NamedTuple):
    """Queries `[H, T, D]` and keys `[G, T, D]` of one chat, as projected and as rotated, the scaling, and
    which tokens each query does not see `[T, T]`, by default those after it.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    rotated_queries: torch.Tensor
    rotated_keys: torch.Tensor
    scaling: float
    unseen: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PairSelection:
    """A way to choose the pairs that stay rotated: exactly one of the three.

    `fixed` gives the R/2 of P pairs that every KV head keeps, of P and R/2. The others give scores
    `[G, P]`, of which the highest are kept: `chat_scores` those of one chat, which are averaged;
    `covariance_scores` those of `folding.pair_covariance`, and whether dropped pairs are folded.
    """

    fixed: Callable[[int, int], torch.Tensor] | None = None
    chat_scores: Callable[[Attended], torch.Tensor] | None = None
    covariance_scores: Callable[[torch.Tensor, bool], torch.Tensor] | None = None

    def pairs(
        self, scores: torch.Tensor | None, *, rope_dim: int, kv_heads: int, rotary_dim: int
    ) -> torch.Tensor:
        """The pairs kept of each KV head, ascending, `[G, R/2]`; `scores` are averaged, None if fixed."""
        if self.fixed is not None:
            return self.fixed(rotary_dim // 2, rope_dim // 2).repeat(kv_heads, 1)
        assert scores is not None, "measured for this method"
        return top_pairs(scores, rope_dim)


@dataclass(frozen=True, kw_only=True)
class RopeSelection:
    """Of one layer, the `pairs [G, R/2]` that stay rotated, and what the others fold to.

    `fold [G, 2, P]` holds a and b (`folding.fold_coefficients`).
    """

    pairs: torch.Tensor
    fold: torch.Tensor | None = None


def top_pairs(scores: torch.Tensor, rope_dim: int) -> torch.Tensor:
    """The R/2 pairs of highest score of each KV head, ascending: `[G, P]` to `[G, R/2]`."""
    return scores.topk(rope_dim // 2, dim=-1).indices.sort(dim=-1).values


def as_pairs(x: torch.Tensor) -> torch.Tensor:
    """`[.., D]` as `[.., P, 2]`."""
    return torch.stack(x.chunk(2, dim=-1), dim=-1)


def split_dims(
    pairs: torch.Tensor, head_dim: int, stride: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dims of each KV head that stay rotated, `[G, R]` in half-split pair order, and the others, `[G, N]`.

    Pair `i` is dims `(i, i + stride)`, by default half of the head's.
    """
    rope = torch.cat([pairs, pairs + (stride or head_dim // 2)], dim=-1)
    is_rope = torch.zeros(len(pairs), head_dim, dtype=torch.bool, device=pairs.device).scatter(1, rope, True)
    others = (~is_rope).nonzero()[:, 1].view(len(pairs), -1)
    return rope, others
