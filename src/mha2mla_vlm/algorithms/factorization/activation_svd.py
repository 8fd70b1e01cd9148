"""PCA of the keys and values of all tokens together."""

from mha2mla_vlm.algorithms.factorization.base import Factorization, Outputs
from mha2mla_vlm.algorithms.factorization.low_rank import Factors, pca_factors
from mha2mla_vlm.algorithms.token_stats import TokenStats


def factors(outputs: Outputs, tokens: TokenStats | None, rank: int) -> Factors:
    """The best of this rank for these tokens."""
    assert tokens is not None, "measured for this method"
    return pca_factors(outputs.weight, tokens.moment, rank)


METHOD = Factorization(factors=factors, statistics="inputs")
