"""What a way to factorise keys and values is.

Shapes: O = G * (N + D) outputs, per KV head N key rows and D value rows; C hidden, r latent dims.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from mha2mla_vlm.algorithms.factorization.low_rank import Factors
from mha2mla_vlm.algorithms.token_stats import TokenStats


class Outputs(NamedTuple):
    """The projection to keys and values of one layer: `weight [O, C]`, and the key dims `[G, N]` in it, of
    which the first `turned` are before RoPE, for they are rotated when they are read.
    """

    weight: torch.Tensor
    key_dims: torch.Tensor
    turned: int = 0

    def is_key(self) -> torch.Tensor:
        """Which rows are of keys, `[O]`."""
        per_head = len(self.weight) // len(self.key_dims)
        rows = torch.arange(len(self.weight), device=self.weight.device)
        return rows % per_head < self.key_dims.shape[1]


@dataclass(frozen=True, kw_only=True)
class Factorization:
    """A way to factorise keys and values; `factors` None leaves them whole.

    `factors` gets the statistics that it names, of the tokens of one modality if `per_modality`, else of
    all: `inputs` are those that go into attention once RoPE is partial, `usage` those of the original
    layer, weighted by the attention that they receive and with the metric of errors
    (`error_metric.attention_usage`). If `centered` it gives a mean, which the up projection's bias brings
    back. If keys and values are factorised `apart` it takes no budget, and `whole` names the one that keeps
    its rank.
    """

    factors: Callable[[Outputs, TokenStats | None, int], Factors] | None
    statistics: Literal["nothing", "inputs", "usage"] = "nothing"
    per_modality: bool = False
    centered: bool = False
    apart: bool = False
    whole: Literal["keys", "values"] | None = None

    @property
    def takes_budget(self) -> bool:
        """Whether ranks can be chosen by layer."""
        return self.factors is not None and not self.apart

    @property
    def after_partial_rope(self) -> bool:
        """Whether a model that has partial RoPE already can be factorised so."""
        return self.takes_budget and self.statistics != "usage"
