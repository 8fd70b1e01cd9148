"""Only keys are factorised."""

from mha2mla_vlm.algorithms.factorization.blocks import apart

METHOD = apart("values")
