"""PCA of keys and values by modality (arXiv 2601.11464, section 3.2)."""

from dataclasses import replace

from mha2mla_vlm.algorithms.factorization import activation_svd

METHOD = replace(activation_svd.METHOD, per_modality=True)
