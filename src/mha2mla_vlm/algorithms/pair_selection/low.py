"""The pairs of lowest frequency stay rotated."""

import torch

from mha2mla_vlm.algorithms.pair_selection.base import PairSelection


def pairs(total: int, kept: int) -> torch.Tensor:
    """The last `kept` of `total` pairs."""
    return torch.arange(total - kept, total)


METHOD = PairSelection(fixed=pairs)
