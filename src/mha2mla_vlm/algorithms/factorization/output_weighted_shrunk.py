"""PCA by modality about the mean, in a metric of output errors and for inputs that are both drawn to what
takes all directions alike: for inputs unlike those of calibration (docs/method.md).
"""

from dataclasses import replace

from mha2mla_vlm.algorithms.factorization import output_weighted
from mha2mla_vlm.algorithms.factorization.base import Outputs
from mha2mla_vlm.algorithms.factorization.low_rank import (
    Factors,
    about_mean,
    metric_roots,
    pca_factors,
    shrunk,
)
from mha2mla_vlm.algorithms.token_stats import TokenStats

INPUT_SHARE = 0.03  # of the mean variance of inputs
METRIC_SHARE = 1.0  # of the mean weight of outputs


def factors(outputs: Outputs, tokens: TokenStats | None, rank: int) -> Factors:
    """The best of this rank for tokens as attention uses them, and passable for others."""
    assert tokens is not None, "measured for this method"
    assert tokens.metric is not None, "measured for this method"
    roots = metric_roots(tokens.metric, outputs.key_dims, turned=outputs.turned, shrinkage=METRIC_SHARE)
    moment = shrunk(tokens.centered().moment, INPUT_SHARE)
    return about_mean(pca_factors(outputs.weight, moment, rank, roots), outputs.weight, tokens.mean)


METHOD = replace(output_weighted.METHOD, factors=factors, centered=True)
