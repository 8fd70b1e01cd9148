"""What a converted model is, and the sizes of a language model's attention."""

import itertools
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

from mha2mla_vlm.errors import InputError, shown
from mha2mla_vlm.strict import Strict, check_types

OnBadRecord = Literal["fail", "skip"]
ROTATE_AT = ("write", "read")
FULL = "full_attention"  # the type of the layers that are converted
CHANNEL_BITS = (16, 8, 4, 2)  # of a latent channel
POSITION_BYTES = 4  # of each number in a token's position
SHARED: tuple[str, ...] = ("shared",)
DECOUPLED: tuple[str, ...] = ("text", "vision")


class LatentBits(NamedTuple):
    """How many of a layer's latent channels, in their order, are kept in 16, 8, 4 and 2 bits."""

    sixteen: int
    eight: int
    four: int
    two: int

    @property
    def counts(self) -> list[int]:
        """Channels by bits, 16 first."""
        return list(self)

    def by_bits(self) -> list[tuple[int, int]]:
        """Bits, and how many channels have them."""
        return list(zip(CHANNEL_BITS, self, strict=True))

    @property
    def rank(self) -> int:
        """Latent dims."""
        return sum(self)

    @property
    def bytes(self) -> list[int]:
        """Bytes of a token's channels by bits, 16 first."""
        return [2 * self.sixteen, self.eight, self.four // 2, self.two // 4]

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's latent."""
        return sum(self.bytes)


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What the attention of one converted layer is.

    `rope_dim` (R) numbers of each KV head's key are rotated. The others and the values are made of a latent
    of `rank` numbers (r), by factors for each of `modalities`; None means that they are not factorised. With
    `bias` the up projections have a bias even if the original has none. Rotated numbers are cached beside the
    latent (`rotate_at` "write"), or made of it too and rotated each time they are read ("read"). With `bits`
    channels of the latent differ in bits (`algorithms.bits`) and rotated keys that are cached have 8, else
    all are numbers of the model's dtype.
    """

    rope_dim: int
    rank: int | None = None
    modalities: tuple[str, ...] = SHARED
    bias: bool = False
    rotate_at: str = "write"
    bits: LatentBits | None = None

    @property
    def at_read(self) -> bool:
        """Whether keys are rotated when they are read."""
        return self.rotate_at == "read"

    def token_bytes(self, sizes: "AttentionSizes", itemsize: int) -> int:
        """Bytes that a token caches, where a number takes `itemsize`: of its latent and its rotated keys."""
        latent, rope = self.widths(sizes)
        return (latent + rope) * itemsize if self.bits is None else self.bits.row_bytes + rope

    def outputs(self, sizes: "AttentionSizes") -> int:
        """Numbers of keys and values, over all KV heads, that are made of the latent."""
        return sizes.kv_heads * (2 * sizes.head_dim - (0 if self.at_read else self.rope_dim))

    def fits(self, sizes: "AttentionSizes") -> bool:
        """Whether there are as many latent dims in keys and values as those that are kept."""
        return self.rank is None or self.rank <= min(sizes.most_latent_dims, self.outputs(sizes))

    def widths(self, sizes: "AttentionSizes") -> tuple[int, int]:
        """Numbers that a token caches: its latent, and its rotated keys."""
        latent = self.outputs(sizes) if self.rank is None else self.rank
        return latent, 0 if self.at_read else sizes.kv_heads * self.rope_dim

    def products(self, sizes: "AttentionSizes") -> int:
        """Multiply-adds of attention that a new token takes for each cached one; at read the most it takes,
        for `model.blocks` makes fewer keys.
        """
        if self.rank is None:
            return sizes.products
        parts = self.rope_dim + self.rank  # rotated keys, and values
        parts += self.rank if self.rope_dim < sizes.head_dim else 0  # the other keys
        made = sizes.kv_heads * self.rope_dim * self.rank if self.at_read else 0
        return sizes.heads * parts + made


@dataclass(frozen=True, kw_only=True)
class MLAConfig(Strict):
    """What of its attention a converted model changes; stored as `mla` in its `config.json`.

    `qk_rope_head_dim` (R) and `kv_lora_rank` (r) hold for all layers or list one value a layer. None in the
    list of `qk_rope_head_dim` is a layer left as the original has it; other lists have None there too, but
    for `predicted_kl`. `kv_lora_rank` None means keys and values are not factorised. `rotate_at` says whether
    rotated keys are cached ("write") or made of the latent when they are read ("read"), for all layers or for
    each. `latent_bits` lists, layer by layer, how many channels of the latent have 16, 8, 4 and 2 bits;
    rotated keys that are cached then have 8. `kv_bias` says that up projections have a bias even if the
    original has none, `folded` that the mean rotation of dropped pairs is in the weights. `kl` holds what
    conversion measured after each transform, against the original, on held-out chats; `predicted_kl`, for
    each layer, what converting it only costs. `original` names the model that was converted, for fine-tuning
    to learn from: a hub id, `zoo:NAME`, or the name of a folder.
    """

    qk_rope_head_dim: int | list[int | None]
    kv_lora_rank: int | list[int | None] | None = None
    rotate_at: str | list[str | None] = "write"
    latent_bits: list[list[int] | None] | None = None
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
        if wrong := [
            each for each in self.latent_bits or () if each is not None and len(each) != len(CHANNEL_BITS)
        ]:
            raise InputError(
                f"latent_bits {shown(wrong[0])}: give how many channels have 16, 8, 4 and 2 bits"
            )
        modes = self.rotate_at if isinstance(self.rotate_at, list) else [self.rotate_at]
        if unknown := [mode for mode in modes if mode not in (*ROTATE_AT, None)]:
            raise InputError(f"rotate_at {shown(unknown[0])}: give {' or '.join(ROTATE_AT)}")

    def layer(self, index: int) -> LayerSpec | None:
        """What a decoder layer's attention is; None for one left as the original has it."""

        def own(value: Any) -> Any:
            """This layer's of what is for all layers or for each."""
            return value[index] if isinstance(value, list) else value

        if own(self.qk_rope_head_dim) is None:
            return None
        return LayerSpec(
            rope_dim=own(self.qk_rope_head_dim),
            rank=own(self.kv_lora_rank),
            modalities=self.modalities,
            bias=self.kv_bias,
            rotate_at=own(self.rotate_at) or "write",
            bits=LatentBits(*bits) if (bits := own(self.latent_bits)) else None,
        )

    def layers(self, sizes: "AttentionSizes") -> list[LayerSpec | None]:
        """What the attention of each decoder layer is."""
        return [self.layer(index) for index in range(sizes.layers)]

    def over_all(self, sizes: "AttentionSizes") -> Self:
        """The same of a model only some of whose layers can be converted: what holds for these, or is listed
        for these, is listed for all, with None (of `predicted_kl` 0) where a layer stays as it was.
        """

        def listed(value: Any, left: Any = None) -> Any:
            if isinstance(value, list) and len(value) == sizes.layers:
                return value
            own = iter(value) if isinstance(value, list) else itertools.repeat(value)
            return [next(own) if index in sizes.growing else left for index in range(sizes.layers)]

        if len(sizes.growing) == sizes.layers:
            return self
        one_rank, one_mode = self.kv_lora_rank is None, isinstance(self.rotate_at, str)
        return replace(
            self,
            qk_rope_head_dim=listed(self.qk_rope_head_dim),
            kv_lora_rank=None if one_rank else listed(self.kv_lora_rank),
            rotate_at=self.rotate_at if one_mode else listed(self.rotate_at),
            latent_bits=None if self.latent_bits is None else listed(self.latent_bits),
            predicted_kl=None if self.predicted_kl is None else listed(self.predicted_kl, 0.0),
        )

    def token_bytes(self, sizes: "AttentionSizes", itemsize: int) -> int:
        """Bytes that a token adds to the cache, over all layers, of `itemsize` bytes a number."""
        left = sizes.numbers_per_token * itemsize
        specs = (self.layer(index) for index in sizes.growing)
        layers = (spec.token_bytes(sizes, itemsize) if spec else left for spec in specs)
        return sum(layers) + self.position_bytes(sizes)

    def position_bytes(self, sizes: "AttentionSizes") -> int:
        """Bytes of a token's position, once for all layers, where keys are rotated when they are read."""
        specs = self.layers(sizes)
        return POSITION_BYTES * sizes.position_axes if any(spec and spec.at_read for spec in specs) else 0

    def decode_cost(self, sizes: "AttentionSizes") -> float:
        """Multiply-adds of attention for each cached token, mean over layers, in those of the original."""
        specs = [self.layer(index) for index in sizes.growing]
        products = [sizes.products if spec is None else spec.products(sizes) for spec in specs]
        return sum(products) / (len(specs) * sizes.products)

    def check(self, sizes: "AttentionSizes") -> None:
        """Raise `InputError` if a model of these sizes cannot have this configuration."""
        for name in ("qk_rope_head_dim", "kv_lora_rank", "rotate_at", "latent_bits", "predicted_kl"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != sizes.layers:
                raise InputError(f"{name} lists {len(value)} layers, the model has {sizes.layers}")
        specs = self.layers(sizes)
        if not any(specs):
            raise InputError("qk_rope_head_dim leaves all layers as they were; give R of at least one")
        for index, spec in enumerate(specs):
            ranks, modes = self.kv_lora_rank, self.rotate_at
            if spec is not None and isinstance(modes, list) and modes[index] is None:
                raise InputError(f"layer {index}: rotate_at is null; give {' or '.join(ROTATE_AT)}")
            if isinstance(ranks, list) and (ranks[index] is None) != (spec is None):
                raise InputError(
                    f"layer {index}: qk_rope_head_dim is {spec and spec.rope_dim} and kv_lora_rank "
                    f"{ranks[index]}; give both, or null twice for a layer left as it was"
                )
            if spec is not None and index not in sizes.growing:
                raise InputError(
                    f"layer {index}: qk_rope_head_dim is {spec.rope_dim}; give null, for its attention is "
                    f"not {FULL}"
                )
            if spec is not None:
                self._check_layer(spec, sizes)

    def _check_layer(self, spec: LayerSpec, sizes: "AttentionSizes") -> None:
        rope = spec.rope_dim
        if rope % 2 or not 2 <= rope <= sizes.rotary_dim:
            whole = sizes.rotary_dim == sizes.head_dim
            most = "the head dim" if whole else f"those that the original rotates of {sizes.head_dim},"
            raise InputError(f"rope dims R = {rope}: give an even number from 2 to {most} {sizes.rotary_dim}")
        largest = spec.outputs(sizes)
        if spec.rank is not None and not 1 <= spec.rank <= largest:
            raise InputError(f"kv_lora_rank {spec.rank}: give 1 to {largest} at R = {rope}")
        if spec.bits is not None:
            self._check_bits(spec.bits, spec.rank)
        if spec.rank is None and spec.at_read:
            raise InputError(
                "rotate_at read needs kv_lora_rank: keys are made of a latent when they are read"
            )

    def _check_bits(self, bits: LatentBits, rank: int | None) -> None:
        if min(bits) < 0 or bits.four % 2 or bits.two % 4 or bits.rank != rank:
            raise InputError(
                f"latent_bits {list(bits)}: give channels of 16, of 8, of 4 (an even number) and of 2 bits "
                f"(a multiple of four) that are kv_lora_rank {rank} together"
            )


@dataclass(frozen=True, kw_only=True)
class AttentionSizes:
    """Sizes of the language model's attention."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    position_axes: int = 1  # numbers in a token's position: three with multimodal RoPE
    rotated: int | None = None  # dims of a head that RoPE turns, if not all
    stride: int | None = None  # from the first dim of a pair to the second, if not half of those
    one_projection: bool = False  # values are what keys are made of
    left: tuple[int, ...] = ()  # layers that keep a state of constant size, or a window of tokens

    @property
    def rotary_dim(self) -> int:
        """Dims of a head that RoPE turns: of its first pairs."""
        return self.head_dim if self.rotated is None else self.rotated

    @property
    def pair_stride(self) -> int:
        """Dims from the first of a pair to its second."""
        return self.rotary_dim // 2 if self.stride is None else self.stride

    @property
    def most_latent_dims(self) -> int:
        """Latent dims that hold keys and values whatever they are."""
        made_of = self.kv_heads * self.head_dim if self.one_projection else self.numbers_per_token
        return min(self.hidden, made_of)

    @property
    def growing(self) -> list[int]:
        """The layers whose cache grows with tokens: these can be converted."""
        return [index for index in range(self.layers) if index not in self.left]

    @property
    def numbers_per_token(self) -> int:
        """Numbers that a token caches in a layer of the original: its keys and values."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def products(self) -> int:
        """Multiply-adds that attention of a new token takes for each cached one in the original."""
        return 2 * self.heads * self.head_dim

    @classmethod
    def of(cls, config: Any) -> Self:
        """Sizes under a whole model's config."""
        return cls.of_text(config.get_text_config(decoder=True))

    @classmethod
    def of_text(cls, text: Any, index: int | None = None) -> Self:
        """Sizes under a language model's config: of its layers of full attention, or of one layer."""
        kinds = getattr(text, "layer_types", None) or ()
        if index is None and FULL in kinds:
            index = list(kinds).index(FULL)
        kind = FULL if index is None or not kinds else kinds[index]
        text = text if index is None else layer_config(text, index)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        rope = rope_parameters(text, kind)
        share = rope.get("partial_rotary_factor", 1)
        rotated = None if share == 1 else int(head_dim * share)
        return cls(
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=head_dim,
            hidden=text.hidden_size,
            position_axes=3 if "mrope_section" in rope else 1,
            rotated=rotated,
            one_projection=bool(getattr(text, "attention_k_eq_v", False)) and kind == FULL,
            stride=head_dim // 2 if rotated is not None and is_proportional(rope) else None,
            left=tuple(index for index, kind in enumerate(kinds) if kind != FULL),
        )


def rope_parameters(text: Any, kind: str = FULL) -> dict[str, Any]:
    """Parameters of RoPE in layers of a kind, under a language model's config."""
    found: Any = getattr(text, "rope_parameters", None)
    own: Any = found.get(kind, found) if isinstance(found, dict) else None
    return own if isinstance(own, dict) else {}


def is_proportional(rope: dict[str, Any]) -> bool:
    """Whether RoPE that turns only a part of a head's dims has its pairs where all of them would be, and
    tables for the others too, that turn by nothing.
    """
    return rope.get("rope_type") == "proportional"


def layer_config(text: Any, index: int) -> Any:
    """A language model's config as one of its layers has it: heads may differ by layer (Gemma 4)."""
    return text.per_layer_config[index] if getattr(text, "is_heterogeneous", False) else text
