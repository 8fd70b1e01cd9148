"""Keys and values are factorised apart, each with half of the latent dims."""

from mha2mla_vlm.algorithms.factorization.blocks import apart

METHOD = apart(None)
