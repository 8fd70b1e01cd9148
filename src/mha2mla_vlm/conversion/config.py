"""How to convert a model."""

import math
from dataclasses import dataclass, replace
from typing import Self

from mha2mla_vlm.algorithms.factorization import FACTORIZATIONS, factorization
from mha2mla_vlm.algorithms.pair_selection import PAIR_SELECTIONS
from mha2mla_vlm.config import ROTATE_AT
from mha2mla_vlm.errors import InputError, shown
from mha2mla_vlm.strict import Strict, option

AUTO = "auto"
SIXTEEN, BY_CHANNEL = "16", "mixed"
LATENT_BITS = (SIXTEEN, BY_CHANNEL, AUTO)
ENOUGH = 0.001  # KL in nats; numbers of 16 bits that cost no more are taken
DEFAULT_BUDGET = {"write": 0.375, "read": 0.125, AUTO: 0.125}
DEFAULT_FACTORIZATION = {
    "write": "output-weighted",
    "read": "output-weighted-shrunk",
    AUTO: "output-weighted-shrunk",
}
DEFAULT_DECODE_COST = 40.0


@dataclass(frozen=True, kw_only=True)
class ConversionConfig(Strict):
    """How to convert a model without training.

    `budget` is the share of the original cache to keep, allocated to layers and to rope and latent
    dims by the loss that each is predicted to cost. With `rotate_at` "write" rotated keys are cached beside
    the latent. With "read" keys are made of the latent when they are read and R costs no bytes: it is the
    whole head dim unless given. With "auto", the default, each layer gets the mode and the sizes that are
    predicted to cost least together under the budget and under `max_decode_cost`.

    `latent_bits` says whether latents are numbers of 16 bits ("16") or channels differ in bits ("mixed").
    With "auto", the default where a budget is allocated, they are of 16, unless these are measured to cost
    more than `ENOUGH` on the held-out chats, and bits by channel to cost less (`conversion.choice`).

    `qk_rope_head_dim` (R) and `d_kv`, per KV head, are instead the same in every layer; given one of them and
    a budget, the other is allocated; given only one of them, the other is a half (R) or a quarter (d_kv) of
    the head dim. What only goes with "write" (these sizes, another pair selection, no fold, a factorisation
    without budget) makes it the default. A share of the records is held out to measure the loss on.
    """

    budget: float | None = option(
        None, "Share of the cache to keep, allocated to layers; else 0.125, or 0.375 at write."
    )
    qk_rope_head_dim: int | None = option(
        None, "R, rope dims kept per KV head: the same in every layer, instead of allocated."
    )
    d_kv: int | None = option(
        None,
        "Latent dims per KV head: the same in every layer, instead of allocated; the latent of a token, "
        "kv_lora_rank, has d_kv for each KV head.",
    )
    rope_selection: str = option(
        "residual", f"Which pairs stay rotated. {PAIR_SELECTIONS.described()}", PAIR_SELECTIONS
    )
    fold: bool = option(True, "Move the mean rotation of dropped pairs into the weights.")
    factorization: str = option(
        None,
        f"How keys and values are factorised. {FACTORIZATIONS.described()}  [default: output-weighted; "
        "output-weighted-shrunk at read and with auto]",
        FACTORIZATIONS,
    )
    rotate_at: str = option(
        None,
        "write: rotated keys are cached beside the latent. read: keys are computed from the latent and "
        "rotated when they are read, which loses far less at small sizes and takes more arithmetic. auto: "
        "each layer as it loses least.  [default: auto; write with sizes or methods that only go with it]",
        DEFAULT_BUDGET,
    )
    max_decode_cost: float | None = option(
        None,
        "With auto: limit on the arithmetic of attention for each cached token, as a multiple of the "
        f"original's, mean over layers.  [default: {DEFAULT_DECODE_COST:g}]",
    )
    latent_bits: str = option(
        None,
        "16: latents are numbers of 16 bits. mixed: 16, 8, 4 or 2 bits for each channel, by what its error "
        "costs, which is better in the same bytes if calibration is broad. auto: 16, unless that is "
        f"measured to cost more than {ENOUGH:g} nats of KL on the held-out chats, and mixed to cost less.  "
        "[default: auto; 16 with fixed sizes]",
        LATENT_BITS,
    )
    samples: int = option(128, "Chats to calibrate and measure on, at most.")
    random_chats: int | None = option(
        None,
        "Chats of random tokens, half with pictures of noise, to calibrate on too.  [default: 32, or as many "
        "as there are others, where these ask one kind of question or have no images; else 0]",
    )
    held_out: float = 0.2

    def __post_init__(self) -> None:
        if self.rotate_at is None:
            object.__setattr__(self, "rotate_at", "write" if self._only_at_write() else AUTO)
        if self.rotate_at not in DEFAULT_BUDGET:
            known = ", ".join(ROTATE_AT)
            raise InputError(f"rotate_at {shown(self.rotate_at)}: give {known} or {AUTO}")
        if self.factorization is None:
            object.__setattr__(self, "factorization", DEFAULT_FACTORIZATION[self.rotate_at])
        PAIR_SELECTIONS.check(self.rope_selection)
        FACTORIZATIONS.check(self.factorization)
        if self.samples < 2:
            raise InputError(
                f"samples = {self.samples}: give at least 2, one to calibrate on and one held out"
            )
        if "read" in self.modes and not factorization(self.factorization).takes_budget:
            raise InputError(
                f"factorization {self.factorization!r} does not go with rotate_at {self.rotate_at}, which "
                "makes keys and values of one latent"
            )
        self._check_auto()
        if self.random_chats is not None and self.random_chats < 0:
            raise InputError(f"random_chats = {self.random_chats}: give 0 or more")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out = {self.held_out}: give a share between 0 and 1")
        if self.d_kv is not None and self.factorization == "none":
            raise InputError(
                f"d_kv = {self.d_kv} has no meaning with factorization 'none'; leave one of them out"
            )
        if self.budget is not None:
            self._check_budget(self.budget)
        self._check_bits()

    def _only_at_write(self) -> bool:
        """Whether sizes or methods are given that rotation at write alone can have."""
        fixed = self.qk_rope_head_dim is not None or self.d_kv is not None
        chosen = self.rope_selection != "residual" or not self.fold
        method = self.factorization
        known = method in FACTORIZATIONS  # else it is refused below
        return fixed or chosen or (known and not factorization(method).takes_budget)

    def _check_auto(self) -> None:
        if self.rotate_at != AUTO:
            if self.max_decode_cost is not None:
                raise InputError(
                    f"max_decode_cost goes with rotate_at {AUTO}, which chooses, not with {self.rotate_at}"
                )
            return
        for name in ("qk_rope_head_dim", "d_kv"):
            if getattr(self, name) is not None:
                raise InputError(f"rotate_at {AUTO} chooses {name} of each layer: give a budget instead")
        if self.max_decode_cost is None:
            object.__setattr__(self, "max_decode_cost", DEFAULT_DECODE_COST)
        elif not 0 < self.max_decode_cost < math.inf:
            raise InputError(
                f"max_decode_cost = {self.max_decode_cost}: give a number above 0, 1 for that of the original"
            )

    def _check_bits(self) -> None:
        if self.latent_bits not in (None, *LATENT_BITS):
            raise InputError(f"latent_bits {shown(self.latent_bits)}: give 16, mixed or auto")
        if self.bits_by_channel and self.share is None:
            raise InputError("latent_bits mixed shares a budget among channels: give one instead of d_kv")
        if self.latent_bits in (None, AUTO):
            chosen = self.share is not None and self.d_kv is None
            object.__setattr__(self, "latent_bits", AUTO if chosen else SIXTEEN)

    def _check_budget(self, budget: float) -> None:
        if not 0 < budget <= 1:
            raise InputError(f"budget = {budget}: give a share of the original cache, above 0 and up to 1")
        if self.qk_rope_head_dim is not None and self.d_kv is not None:
            raise InputError("budget, qk_rope_head_dim and d_kv together say too much; leave one of them out")
        if self.at_read and self.d_kv is not None:
            raise InputError(
                "budget and d_kv together say too much at read, where all is latent; leave one out"
            )
        if not factorization(self.factorization).takes_budget:
            raise InputError(
                f"factorization {self.factorization!r} has no ranks to allocate; "
                "give qk_rope_head_dim and d_kv instead"
            )

    @property
    def at_read(self) -> bool:
        """Whether keys are rotated when they are read."""
        return self.rotate_at == "read"

    @property
    def bits_by_channel(self) -> bool:
        """Whether each latent channel gets bits of its own."""
        return self.latent_bits == BY_CHANNEL

    @property
    def tried_bits(self) -> tuple[str, ...]:
        """How latents may be kept."""
        return (SIXTEEN, BY_CHANNEL) if self.latent_bits == AUTO else (self.latent_bits,)

    def keeping(self, bits: str) -> Self:
        """The same for one of `tried_bits`."""
        return replace(self, latent_bits=bits)

    @property
    def modes(self) -> tuple[str, ...]:
        """When keys of a layer may be rotated."""
        return ROTATE_AT if self.rotate_at == AUTO else (self.rotate_at,)

    def of(self, mode: str) -> Self:
        """The same for one of `modes`, at the same budget."""
        if self.rotate_at == mode:
            return self
        return replace(self, rotate_at=mode, budget=self.share, max_decode_cost=None)

    @property
    def drops_pairs(self) -> bool:
        """Whether some pairs are not rotated any more: at read none is dropped unless rope dims are given."""
        return "write" in self.modes or self.qk_rope_head_dim is not None

    @property
    def share(self) -> float | None:
        """The share of the cache to allocate to layers, or None if all have the same sizes."""
        fixed = self.d_kv is not None or (self.qk_rope_head_dim is not None and not self.at_read)
        if self.budget is None and not fixed and factorization(self.factorization).takes_budget:
            return DEFAULT_BUDGET[self.rotate_at]
        return self.budget
