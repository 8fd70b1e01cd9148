"""PCA by modality in the metric of what errors do to attention's output, about the mean."""

from dataclasses import replace

from mha2mla_vlm.algorithms.factorization import output_weighted
from mha2mla_vlm.algorithms.factorization.base import Outputs
from mha2mla_vlm.algorithms.factorization.low_rank import Factors, about_mean
from mha2mla_vlm.algorithms.token_stats import TokenStats


def factors(outputs: Outputs, tokens: TokenStats | None, rank: int) -> Factors:
    """The best of this rank for what differs from the mean token, as attention uses tokens."""
    assert tokens is not None, "measured for this method"
    found = output_weighted.factors(outputs, tokens.centered(), rank)
    return about_mean(found, outputs.weight, tokens.mean)


METHOD = replace(output_weighted.METHOD, factors=factors, centered=True)
