"""How to convert a model."""

from dataclasses import dataclass

from mha2mla_vlm.algorithms.factorization import FACTORIZATIONS, factorization
from mha2mla_vlm.algorithms.pair_selection import PAIR_SELECTIONS
from mha2mla_vlm.config import ROTATE_AT, Strict, option
from mha2mla_vlm.errors import InputError, shown

DEFAULT_BUDGET = {"write": 0.375, "read": 0.125}
DEFAULT_FACTORIZATION = {"write": "output-weighted", "read": "output-weighted-shrunk"}


@dataclass(frozen=True, kw_only=True)
class ConversionConfig(Strict):
    """How to convert a model without training.

    `budget` is the share of the original cache to keep, allocated to layers and to rope and latent
    dims by the loss that each is predicted to cost. `rope_dim` (R) and `d_kv`, per KV head,
    are instead the same in every layer; given one of them and a budget, the other is allocated;
    given only one of them, the other is a half (R) or a quarter (d_kv) of the head dim.
    With none of the three the budget is 37.5%. With `rotate_at` "read" keys are made of the latent when they
    are read and R costs no bytes: it is the whole head dim unless given, and the budget, by default 12.5%, is
    allocated to latent dims. A share of the records is held out to measure the loss on.
    """

    budget: float | None = option(
        None, "Share of the cache to keep, allocated to layers; else 0.375, or 0.125 at read."
    )
    rope_dim: int | None = option(None, "R, rope dims kept per head, instead the same in every layer.")
    d_kv: int | None = option(None, "Latent dims per KV head, instead the same in every layer.")
    rope_selection: str = option("residual", f"Which pairs stay rotated. {PAIR_SELECTIONS.described()}")
    fold: bool = option(True, "Move the mean rotation of dropped pairs into the weights.")
    factorization: str = option(
        None,
        f"How keys and values are factorised. {FACTORIZATIONS.described()}  [default: output-weighted; "
        "output-weighted-shrunk at read]",
    )
    rotate_at: str = option(
        "write",
        "write: rotated keys are cached beside the latent. read: keys are made of the latent and rotated "
        "when they are read, which is far better at small sizes and takes more arithmetic.",
    )
    samples: int = option(128, "Chats to calibrate and measure on, at most.")
    random_chats: int = option(
        0,
        "Chats of random tokens, half with noise, to calibrate on besides: if yours are few or of one kind.",
    )
    held_out: float = 0.2

    def __post_init__(self) -> None:
        if self.rotate_at not in ROTATE_AT:
            raise InputError(f"rotate_at {shown(self.rotate_at)}: give {' or '.join(ROTATE_AT)}")
        if self.factorization is None:
            object.__setattr__(self, "factorization", DEFAULT_FACTORIZATION[self.rotate_at])
        PAIR_SELECTIONS.check(self.rope_selection)
        FACTORIZATIONS.check(self.factorization)
        if self.samples < 2:
            raise InputError(
                f"samples = {self.samples}: give at least 2, one to calibrate on and one held out"
            )
        if self.at_read and not factorization(self.factorization).takes_budget:
            raise InputError(
                f"factorization {self.factorization!r} does not go with rotate_at read, which makes keys and "
                "values of one latent"
            )
        if self.random_chats < 0:
            raise InputError(f"random_chats = {self.random_chats}: give 0 or more")
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
        if self.at_read and self.d_kv is not None:
            raise InputError(
                "budget and d_kv together say too much at read, where all is latent; leave one out"
            )
        if not factorization(self.factorization).takes_budget:
            raise InputError(
                f"factorization {self.factorization!r} has no ranks to allocate; "
                "give rope_dim and d_kv instead"
            )

    @property
    def at_read(self) -> bool:
        """Whether keys are rotated when they are read."""
        return self.rotate_at == "read"

    @property
    def drops_pairs(self) -> bool:
        """Whether some pairs are not rotated any more: at read none is dropped unless rope dims are given."""
        return not self.at_read or self.rope_dim is not None

    @property
    def share(self) -> float | None:
        """The share of the cache to allocate to layers, or None if all have the same sizes."""
        fixed = self.d_kv is not None or (self.rope_dim is not None and not self.at_read)
        if self.budget is None and not fixed and factorization(self.factorization).takes_budget:
            return DEFAULT_BUDGET[self.rotate_at]
        return self.budget
