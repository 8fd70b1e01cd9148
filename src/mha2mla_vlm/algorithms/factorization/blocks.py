"""Keys and values factorised apart, by the SVD of their weights."""

from typing import Literal

import torch

from mha2mla_vlm.algorithms.factorization.base import Factorization, Outputs
from mha2mla_vlm.algorithms.factorization.low_rank import Factors, pca_factors
from mha2mla_vlm.algorithms.token_stats import TokenStats

Whole = Literal["keys", "values"] | None


def block_ranks(rank: int, keys: int, values: int, whole: Whole) -> tuple[int, int]:
    """How `rank` is shared by `keys` and `values` rows: evenly, or all that the `whole` one leaves."""
    key_rank = {None: rank // 2, "values": rank - values, "keys": keys}[whole]
    return key_rank, rank - key_rank


def block_factors(weight: torch.Tensor, is_key: torch.Tensor, rank: int, whole: Whole) -> Factors:
    """Factors of keys and values apart; `is_key [O]` marks key rows."""
    ranks = block_ranks(rank, int(is_key.sum()), int((~is_key).sum()), whole)
    identity = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
    down, up = [], torch.zeros(len(weight), rank, dtype=torch.float64, device=weight.device)
    start = 0
    for rows, part in zip((is_key, ~is_key), ranks, strict=True):
        factors = pca_factors(weight[rows], identity, part)
        up[rows, start : start + part] = factors.up
        down.append(factors.down)
        start += part
    return Factors(down=torch.cat(down), up=up)


def apart(whole: Whole) -> Factorization:
    """The method that keeps one of both whole, or neither."""

    def factors(outputs: Outputs, _: TokenStats | None, rank: int) -> Factors:
        """Of these ranks together."""
        return block_factors(outputs.weight, outputs.is_key(), rank, whole)

    return Factorization(factors=factors, apart=True, whole=whole)
