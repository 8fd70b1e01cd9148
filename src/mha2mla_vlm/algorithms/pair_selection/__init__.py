"""Which frequency pairs of each KV head stay rotated: the methods by name.

A method is a file here with its `METHOD`, a `base.PairSelection`, and a line in the table.
"""

from typing import TYPE_CHECKING, Any

from mha2mla_vlm.algorithms.registry import Entry, Registry

if TYPE_CHECKING:
    from mha2mla_vlm.algorithms.pair_selection.base import PairSelection

PAIR_SELECTIONS = Registry(
    "rope selection",
    __name__,
    {
        "high": Entry("high", "the pairs of highest frequency"),
        "low": Entry("low", "those of lowest frequency"),
        "uniform": Entry("uniform", "evenly spaced frequencies"),
        "2-norm": Entry("two_norm", "the longest in queries and keys"),
        "mkl": Entry("mkl", "those that attention changes most without (published)"),
        "rotation-kl": Entry("rotation_kl", "those that attention changes most without their rotation"),
        "residual": Entry("residual", "those whose rotation the others cannot make up for (ours)"),
    },
)


def pair_selection(name: Any) -> "PairSelection":
    """The method of this name; raises `InputError` for an unknown one."""
    found: PairSelection = PAIR_SELECTIONS.find(name)
    return found
