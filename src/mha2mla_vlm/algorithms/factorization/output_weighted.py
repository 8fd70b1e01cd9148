"""PCA by modality in the metric of what errors do to attention's output (docs/method.md)."""

from mha2mla_vlm.algorithms.factorization.base import Factorization, Outputs
from mha2mla_vlm.algorithms.factorization.low_rank import Factors, metric_roots, pca_factors
from mha2mla_vlm.algorithms.token_stats import TokenStats


def factors(outputs: Outputs, tokens: TokenStats | None, rank: int) -> Factors:
    """The best of this rank for tokens as attention uses them."""
    assert tokens is not None, "measured for this method"
    assert tokens.metric is not None, "measured for this method"
    roots = metric_roots(tokens.metric, outputs.key_dims, turned=outputs.turned)
    return pca_factors(outputs.weight, tokens.moment, rank, roots)


METHOD = Factorization(factors=factors, statistics="usage", per_modality=True)
