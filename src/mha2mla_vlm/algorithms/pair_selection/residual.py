"""The pairs stay rotated whose rotation the fold of the others can least make up for (docs/method.md)."""

import torch

from mha2mla_vlm.algorithms.folding import drop_order
from mha2mla_vlm.algorithms.pair_selection.base import PairSelection


def scores(covariance: torch.Tensor, fold: bool) -> torch.Tensor:
    """Places of pairs in the order in which dropping them costs least, `[G, P]`."""
    order = drop_order(covariance, fold=fold)
    return torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order).to(order))


METHOD = PairSelection(covariance_scores=scores)
