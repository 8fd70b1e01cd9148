"""Pairs at even distances stay rotated."""

import torch

from mha2mla_vlm.algorithms.pair_selection.base import PairSelection


def pairs(total: int, kept: int) -> torch.Tensor:
    """Every `total / kept`-th pair."""
    return torch.arange(kept) * total // kept


METHOD = PairSelection(fixed=pairs)
