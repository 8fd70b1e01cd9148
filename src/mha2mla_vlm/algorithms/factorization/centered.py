"""PCA of keys and values by modality, about their mean."""

from mha2mla_vlm.algorithms.factorization.base import Factorization, Outputs
from mha2mla_vlm.algorithms.factorization.low_rank import Factors, about_mean, pca_factors
from mha2mla_vlm.algorithms.token_stats import TokenStats


def factors(outputs: Outputs, tokens: TokenStats | None, rank: int) -> Factors:
    """The best of this rank for what differs from the mean token."""
    assert tokens is not None, "measured for this method"
    return about_mean(
        pca_factors(outputs.weight, tokens.centered().moment, rank), outputs.weight, tokens.mean
    )


METHOD = Factorization(factors=factors, statistics="inputs", per_modality=True, centered=True)
