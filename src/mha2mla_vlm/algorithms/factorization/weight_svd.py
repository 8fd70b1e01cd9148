"""SVD of the weights of keys and values together, which needs no calibration."""

import torch

from mha2mla_vlm.algorithms.factorization.base import Factorization, Outputs
from mha2mla_vlm.algorithms.factorization.low_rank import Factors, pca_factors
from mha2mla_vlm.algorithms.token_stats import TokenStats


def factors(outputs: Outputs, _: TokenStats | None, rank: int) -> Factors:
    """The best of this rank where all inputs are alike."""
    return pca_factors(outputs.weight, torch.eye(outputs.weight.shape[1], device=outputs.weight.device), rank)


METHOD = Factorization(factors=factors)
