"""Frozen, keyword-only configurations: what they have in common, and that of a converted model."""

from dataclasses import MISSING, asdict, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Self, cast, get_args, get_origin

from mha2mla_vlm.errors import InputError, shown

OnBadRecord = Literal["fail", "skip"]
SHARED: tuple[str, ...] = ("shared",)
DECOUPLED: tuple[str, ...] = ("text", "vision")
_KIND_NAMES = {
    NoneType: "nothing",
    bool: "true or false",
    str: "text",
    int: "a whole number",
    float: "a number",
}


def option(default: Any, text: str) -> Any:
    """A field with its line of help, which the command line shows too."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Strict:
    """A dataclass that is read from a mapping and rejects keys that it does not know."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read from a mapping; raises `InputError` for unknown and for missing keys."""
        if not isinstance(values, dict):
            raise InputError(f"{cls.__name__} must be a mapping, not {shown(values)}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(map(str, set(values) - known)):
            listed = ", ".join(unknown)[:200]
            raise InputError(f"unknown key(s) {listed} in {cls.__name__}; known: {', '.join(sorted(known))}")
        needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        if missing := sorted(needed - set(values)):
            raise InputError(f"missing key(s) {', '.join(missing)} in {cls.__name__}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def check_types(config: Any) -> None:
    """Raise `InputError` for a field whose value is not of its declared type; a whole number is a float too.

    YAML reads `1e-5` as text and `yes` as true.
    """
    for item in fields(config):
        value, declared = getattr(config, item.name), cast(Any, item.type)
        if not _fits(value, declared):
            kinds = get_args(declared) if get_origin(declared) is UnionType else (declared,)
            wanted = " or ".join(_KIND_NAMES.get(kind, str(kind)) for kind in kinds)
            hint = "; write 1.0e-5 for 1e-5" if float in kinds and isinstance(value, str) else ""
            raise InputError(f"{item.name} = {shown(value)}: give {wanted}{hint}")


def _fits(value: Any, declared: Any) -> bool:
    kind, inner = get_origin(declared) or declared, get_args(declared)
    if kind is UnionType:
        return any(_fits(value, each) for each in inner)
    if kind is dict:
        return isinstance(value, dict) and all(
            _fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items()
        )
    if kind in (list, tuple):
        return isinstance(value, kind) and all(_fits(each, inner[0]) for each in value)
    return kind is Any or type(value) is kind or (kind is float and type(value) is int)


@dataclass(frozen=True, kw_only=True)
class MLAConfig(Strict):
    """What of its attention a converted model changes; stored as `mla` in its `config.json`.

    `qk_rope_head_dim` (R) and `kv_lora_rank` (r) hold for all layers or list one value a layer.
    `kv_lora_rank` None means keys and values are not factorised. `kv_bias` tells that up projections
    have a bias even if the original has none. `folded` tells that the mean rotation of dropped pairs
    is in the weights. `kl` holds what conversion measured after each transform, against the
    original, on held-out chats; `predicted_kl`, for each layer, what converting it alone costs.
    `original` names the model that was converted, for fine-tuning to learn from: a hub id, `zoo:NAME`, or
    the name of a folder.
    """

    qk_rope_head_dim: int | list[int]
    kv_lora_rank: int | list[int] | None = None
    modalities: tuple[str, ...] = SHARED
    rope_selection: str | None = None
    factorization: str | None = None
    folded: bool = False
    kv_bias: bool = False
    kl: dict[str, float] | None = None
    predicted_kl: list[float] | None = None
    original: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.modalities, list):  # as JSON has it
            object.__setattr__(self, "modalities", tuple(self.modalities))
        check_types(self)
        if self.modalities not in (SHARED, DECOUPLED):
            raise InputError(f"modalities {self.modalities} are not known; known: {SHARED}, {DECOUPLED}")

    def layer(self, index: int) -> tuple[int, int | None]:
        """R and r of a layer."""
        rope, rank = self.qk_rope_head_dim, self.kv_lora_rank
        return (
            rope[index] if isinstance(rope, list) else rope,
            rank[index] if isinstance(rank, list) else rank,
        )

    def check(self, sizes: "AttentionSizes") -> None:
        """Raise `InputError` if a model of these sizes cannot have this configuration."""
        for name in ("qk_rope_head_dim", "kv_lora_rank", "predicted_kl"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != sizes.layers:
                raise InputError(f"{name} lists {len(value)} layers, the model has {sizes.layers}")
        for rope, rank in map(self.layer, range(sizes.layers)):
            if rope % 2 or not 2 <= rope <= sizes.head_dim:
                raise InputError(
                    f"rope dims R = {rope}: give an even number from 2 to the head dim {sizes.head_dim}"
                )
            if rank is not None:
                self._check_rank(rank, rope, sizes)

    def _check_rank(self, rank: int, rope: int, sizes: "AttentionSizes") -> None:
        largest = sizes.kv_heads * (2 * sizes.head_dim - rope)
        if not 1 <= rank <= largest:
            raise InputError(f"kv_lora_rank {rank}: give 1 to {largest} at R = {rope}")


@dataclass(frozen=True, kw_only=True)
class AttentionSizes:
    """Sizes of the language model's attention."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int

    @classmethod
    def of(cls, config: Any) -> Self:
        """Sizes under a whole model's config."""
        text = config.get_text_config(decoder=True)
        return cls(
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            hidden=text.hidden_size,
        )
