"""How to convert a model."""

from dataclasses import dataclass

from mha2mla_vlm.algorithms.factorization import FACTORIZATIONS, factorization
from mha2mla_vlm.algorithms.pair_selection import PAIR_SELECTIONS
from mha2mla_vlm.algorithms.registry import check, described
from mha2mla_vlm.config import Strict, option
from mha2mla_vlm.errors import InputError

DEFAULT_BUDGET = 0.375


@dataclass(frozen=True, kw_only=True)
class ConversionConfig(Strict):
    """How to convert a model without training.

    `budget` is the share of the original cache to keep, allocated to layers and to rope and latent
    dims by the loss that each is predicted to cost. `rope_dim` (R) and `d_kv`, per KV head,
    are instead the same in every layer; given one of them and a budget, the other is allocated;
    given only one of them, the other is a half (R) or a quarter (d_kv) of the head dim.
    With none of the three the budget is 37.5%. A share of the records is held out to measure the
    loss on.
    """

    budget: float | None = option(None, "Share of the cache to keep, allocated to layers; else 0.375.")
    rope_dim: int | None = option(None, "R, rope dims kept per head, instead the same in every layer.")
    d_kv: int | None = option(None, "Latent dims per KV head, instead the same in every layer.")
    rope_selection: str = option("residual", f"Which pairs stay rotated. {described(PAIR_SELECTIONS)}")
    fold: bool = option(True, "Move the mean rotation of dropped pairs into the weights.")
    factorization: str = option(
        "output-weighted", f"How keys and values are factorised. {described(FACTORIZATIONS)}"
    )
    samples: int = option(128, "Chats to calibrate and measure on, at most.")
    held_out: float = 0.2

    def __post_init__(self) -> None:
        check(PAIR_SELECTIONS, "rope selection", self.rope_selection)
        check(FACTORIZATIONS, "factorization", self.factorization)
        if self.samples < 2:
            raise InputError(
                f"samples = {self.samples}: give at least 2, one to calibrate on and one held out"
            )
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out = {self.held_out}: give a share between 0 and 1")
        if self.d_kv is not None and self.factorization == "none":
            raise InputError(
                f"d_kv = {self.d_kv} has no meaning with factorization 'none'; leave one of them out"
            )
        if self.budget is not None:
            self._check_budget(self.budget)

    def _check_budget(self, budget: float) -> None:
        if not 0 < budget <= 1:
            raise InputError(f"budget = {budget}: give a share of the original cache, above 0 and up to 1")
        if self.rope_dim is not None and self.d_kv is not None:
            raise InputError("budget, rope_dim and d_kv together say too much; leave one of them out")
        if not factorization(self.factorization).takes_budget:
            raise InputError(
                f"factorization {self.factorization!r} has no ranks to allocate; "
                "give rope_dim and d_kv instead"
            )

    @property
    def share(self) -> float | None:
        """The share of the cache to allocate to layers, or None if all have the same sizes."""
        fixed = self.rope_dim is not None or self.d_kv is not None
        if self.budget is None and not fixed and factorization(self.factorization).takes_budget:
            return DEFAULT_BUDGET
        return self.budget
