"""Frozen, keyword-only configurations: of a converted model, and of a conversion."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

from mha2mla_vlm.errors import InputError

RopeSelectionName = Literal["high", "low", "uniform", "2-norm", "mkl"]
FactorizationName = Literal[
    "none", "weight-svd", "activation-svd", "md-svd", "split", "only-key", "only-value"
]
ROPE_SELECTIONS: tuple[str, ...] = get_args(RopeSelectionName)
FACTORIZATIONS: tuple[str, ...] = get_args(FactorizationName)
SHARED: tuple[str, ...] = ("shared",)
DECOUPLED: tuple[str, ...] = ("text", "vision")


@dataclass(frozen=True, kw_only=True)
class _Strict:
    """A dataclass that is read from a mapping and rejects keys that it does not know."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InputError(
                f"unknown key(s) {', '.join(unknown)} in {cls.__name__}; known: {', '.join(sorted(known))}"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class MLAConfig(_Strict):
    """What of its attention a converted model changes; stored as `mla` in its `config.json`.

    `qk_rope_head_dim` (R) and `kv_lora_rank` (r) hold for all layers or list one value a layer.
    `kv_lora_rank` None means keys and values are not factorised. `kl` holds what conversion
    measured after each transform, against the original, on held-out chats.
    """

    qk_rope_head_dim: int | list[int]
    kv_lora_rank: int | list[int] | None = None
    modalities: tuple[str, ...] = SHARED
    rope_selection: str | None = None
    factorization: str | None = None
    kl: dict[str, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "modalities", tuple(self.modalities))
        if self.modalities not in (SHARED, DECOUPLED):
            raise InputError(f"modalities {self.modalities} are not known; known: {SHARED}, {DECOUPLED}")

    def layer(self, index: int) -> tuple[int, int | None]:
        """R and r of a layer."""
        rope, rank = self.qk_rope_head_dim, self.kv_lora_rank
        return (
            rope[index] if isinstance(rope, list) else rope,
            rank[index] if isinstance(rank, list) else rank,
        )

    def check(self, *, layers: int, head_dim: int, kv_heads: int, hidden: int) -> None:
        """Raise `InputError` if a model of these sizes cannot have this configuration."""
        for name, value in (("qk_rope_head_dim", self.qk_rope_head_dim), ("kv_lora_rank", self.kv_lora_rank)):
            if isinstance(value, list) and len(value) != layers:
                raise InputError(f"{name} lists {len(value)} layers, the model has {layers}")
        for rope, rank in map(self.layer, range(layers)):
            if rope % 2 or not 2 <= rope <= head_dim:
                raise InputError(
                    f"rope dims R = {rope} per head: give an even number from 2 to the head dim {head_dim}"
                )
            largest = min(hidden, kv_heads * (2 * head_dim - rope))
            if self.factorization in ("only-key", "only-value"):
                largest = kv_heads * (2 * head_dim - rope)  # one of the two is kept whole
            if rank is not None and not 1 <= rank <= largest:
                raise InputError(
                    f"kv_lora_rank {rank}: give 1 to {largest}, that is d_kv up to {largest // kv_heads} "
                    f"per KV head at R = {rope}"
                )


@dataclass(frozen=True, kw_only=True)
class ConversionConfig(_Strict):
    """How to convert a model without training. Defaults keep 37.5% of the cache.

    `rope_dim` (R) and `d_kv` are per KV head; left out they are a half and a quarter of the head
    dim. A share of the records is held out to measure the loss on.
    """

    rope_dim: int | None = None
    d_kv: int | None = None
    rope_selection: str = "mkl"
    factorization: str = "md-svd"
    samples: int = 128
    held_out: float = 0.2

    def __post_init__(self) -> None:
        for name, known in (("rope_selection", ROPE_SELECTIONS), ("factorization", FACTORIZATIONS)):
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"unknown {name.replace('_', ' ')} {value!r}; known: {', '.join(known)}")
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
