"""Keys and values stay whole."""

from mha2mla_vlm.algorithms.factorization.base import Factorization

METHOD = Factorization(factors=None)
