"""The pairs of highest frequency stay rotated."""

import torch

from mha2mla_vlm.algorithms.pair_selection.base import PairSelection


def pairs(total: int, kept: int) -> torch.Tensor:
    """The first `kept` of `total` pairs."""
    return torch.arange(kept)


METHOD = PairSelection(fixed=pairs)
