"""How keys and values become factors of low rank: the methods by name.

A method is a file here with its `METHOD`, a `base.Factorization`, and a line in the table.
"""

from typing import TYPE_CHECKING, Any

from mha2mla_vlm.algorithms.registry import Entry, Registry

if TYPE_CHECKING:
    from mha2mla_vlm.algorithms.factorization.base import Factorization

FACTORIZATIONS = Registry(
    "factorization",
    __name__,
    {
        "none": Entry("none", "keys and values stay whole"),
        "weight-svd": Entry("weight_svd", "SVD of the weights"),
        "activation-svd": Entry("activation_svd", "PCA of keys and values"),
        "md-svd": Entry("md_svd", "the same by modality (published)"),
        "centered": Entry("centered", "by modality about the mean"),
        "output-weighted": Entry("output_weighted", "by modality, in the metric of output errors (ours)"),
        "output-weighted-centered": Entry("output_weighted_centered", "that about the mean"),
        "output-weighted-shrunk": Entry("output_weighted_shrunk", "that, for unseen kinds of input too"),
        "split": Entry("split", "SVD of keys and values apart"),
        "only-key": Entry("only_key", "SVD of keys, values whole"),
        "only-value": Entry("only_value", "SVD of values, keys whole"),
    },
)


def factorization(name: Any) -> "Factorization":
    """The method of this name; raises `InputError` for an unknown one."""
    found: Factorization = FACTORIZATIONS.find(name)
    return found
