"""Sizes of each layer under a budget of the cache, by what converting layers was predicted to cost."""

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from mha2mla_vlm.algorithms.budget import Curve, Option, allocate, choose, interpolate, least_work, unit_dims
from mha2mla_vlm.config import POSITION_BYTES, AttentionSizes, LatentBits, LayerSpec, MLAConfig
from mha2mla_vlm.conversion.config import AUTO, ConversionConfig

ROPE_UNITS = (1, 2, 4, 6, 8, 10, 12, 14)  # of 16, tried
LATENT_UNITS = (1, 2, 3, 4, 6, 8, 12)
READ_UNITS = (2, 4, 6, 8, 12, 16, 24, 32, 48)  # of 32, where keys are made of latents too
BY_CHANNEL_UNITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of 32 in bytes, where channels differ in bits

BitsBySize = dict[int, LatentBits]


@dataclass(frozen=True, kw_only=True)
class LayerLosses:
    """KL divergence that converting only one layer costs, predicted by `sensitivity`: by units of rope dims,
    and of latent dims beyond that at half of the rope dims; and, rotated at read, by units of latent dims.
    `bits` are those of channels, by mode and units, where a unit is bytes.
    """

    rope: Curve = field(default_factory=dict)
    latent: Curve = field(default_factory=dict)
    read: Curve = field(default_factory=dict)
    bits: dict[str, BitsBySize] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, dict[str, Any]]) -> Self:
        """From plain values."""
        bits = {
            mode: {int(k): LatentBits(*v) for k, v in sizes.items()}
            for mode, sizes in values.get("bits", {}).items()
        }
        curves = {name: curve for name, curve in values.items() if name != "bits"}
        return cls(bits=bits, **{n: {int(k): v for k, v in curve.items()} for n, curve in curves.items()})


def dims_in_unit(sizes: AttentionSizes, mode: str) -> int:
    """Dims per KV head that the budget is allocated in: finer where all are latent dims."""
    return unit_dims(sizes.head_dim) // (2 if mode == "read" else 1)


def tried_units(sizes: AttentionSizes, mode: str, *, by_channel: bool = False) -> dict[str, list[int]]:
    """Units at which losses are measured, by the names of the curves in `LayerLosses`."""
    unit = dims_in_unit(sizes, mode)
    if by_channel:  # of 8 bits there are twice as many dims in a unit
        return {"read": [units for units in BY_CHANNEL_UNITS if 2 * units * unit <= most_latent(sizes, 0)]}
    if mode == "read":
        return {"read": [units for units in READ_UNITS if units * unit <= most_latent(sizes, 0)]}
    most = most_latent(sizes, sizes.head_dim // 2)
    return {
        "rope": [units for units in ROPE_UNITS if units * unit < sizes.head_dim],
        "latent": [units for units in LATENT_UNITS if units * unit <= most],
    }


def most_latent(sizes: AttentionSizes, rope_dim: int) -> int:
    """Largest d_kv where a number of rope dims is cached beside the latent."""
    return min(sizes.hidden // sizes.kv_heads, 2 * sizes.head_dim - rope_dim)


def budget_units(sizes: AttentionSizes, config: ConversionConfig) -> int:
    """The budget in units of `dims_in_unit`, over all layers; positions, if they are kept, come out of it."""
    kept = (config.share or 0.0) * 2 * sizes.head_dim * sizes.layers
    if config.at_read:  # as numbers of 16 bits
        kept -= POSITION_BYTES / 2 * sizes.position_axes / sizes.kv_heads
    return int(kept / dims_in_unit(sizes, config.rotate_at) + 1e-9)


def allocated(
    mla: MLAConfig, losses: Sequence[LayerLosses], sizes: AttentionSizes, config: ConversionConfig
) -> MLAConfig:
    """`mla` with the sizes of each layer that cost least together under the budget of `config`."""
    if config.rotate_at == AUTO:
        return _allocated_modes(mla, losses, sizes, config)
    if config.at_read:
        return _allocated_latents(mla, losses, sizes, config)
    unit = unit_dims(sizes.head_dim)
    rope, latent = ([_curves(layer, sizes)[n] for layer in losses] for n in range(2))
    if config.rope_dim is not None:
        rope = [{config.rope_dim // unit: 0.0}] * len(rope)
    if config.d_kv is not None:
        latent = [{config.d_kv // unit: 0.0}] * len(latent)
    chosen = allocate(rope, latent, budget_units(sizes, config))
    return replace(
        mla,
        qk_rope_head_dim=[a * unit for a, _ in chosen],
        kv_lora_rank=[b * unit * sizes.kv_heads for _, b in chosen],
        predicted_kl=[r[a] + c[b] for (a, b), r, c in zip(chosen, rope, latent, strict=True)],
    )


def _curves(layer: LayerLosses, sizes: AttentionSizes) -> tuple[dict[int, float], dict[int, float]]:
    """Losses of a layer by units of rope dims and of latent dims."""
    unit = unit_dims(sizes.head_dim)
    whole = sizes.head_dim // unit
    most = min(whole, most_latent(sizes, sizes.head_dim) // unit)
    return interpolate(layer.rope, whole - 1) | {whole: 0.0}, interpolate(layer.latent, most)


def _read_curve(layer: LayerLosses, sizes: AttentionSizes) -> dict[int, float]:
    """Losses of a layer by units of latent dims, where keys are rotated at read."""
    return interpolate(layer.read, most_latent(sizes, 0) // dims_in_unit(sizes, "read"))


def _allocated_latents(
    mla: MLAConfig, losses: Sequence[LayerLosses], sizes: AttentionSizes, config: ConversionConfig
) -> MLAConfig:
    """The same where keys are rotated at read: all is latent dims."""
    unit = dims_in_unit(sizes, "read")
    most = most_latent(sizes, 0) // unit // (2 if config.bits_by_channel else 1)
    curves = [interpolate(layer.read, most) for layer in losses]
    chosen = allocate([{0: 0.0}] * len(curves), curves, budget_units(sizes, config))
    mla = replace(mla, predicted_kl=[curve[units] for (_, units), curve in zip(chosen, curves, strict=True)])
    if not config.bits_by_channel:
        return replace(mla, kv_lora_rank=[units * unit * sizes.kv_heads for _, units in chosen])
    bits = [layer.bits["read"][units] for (_, units), layer in zip(chosen, losses, strict=True)]
    listed: list[list[int] | None] = [list(each) for each in bits]
    return replace(mla, kv_lora_rank=[each.rank for each in bits], latent_bits=listed, kv_bias=True)


def _allocated_modes(
    mla: MLAConfig, losses: Sequence[LayerLosses], sizes: AttentionSizes, config: ConversionConfig
) -> MLAConfig:
    """The same where each layer may be rotated at write or at read, within the limit of arithmetic too."""
    assert config.max_decode_cost is not None, "set where modes are chosen"
    best: list[tuple[LayerSpec, Option]] = []
    for options, units in _ways(mla, losses, sizes, config):
        listed = [list(layer.items()) for layer in options]
        given = ([[option for _, option in layer] for layer in listed], units)
        try:
            numbers = choose(*given, config.max_decode_cost * sizes.layers)
        except ValueError:
            continue
        found = [layer[number] for layer, number in zip(listed, numbers, strict=True)]
        if not best or _loss(found) < _loss(best):
            best = found
    if not best:
        raise ValueError(f"no sizes are within {config}")
    specs = [spec for spec, _ in best]
    drops_pairs = any(not spec.at_read for spec in specs)
    return replace(
        mla,
        qk_rope_head_dim=_same([spec.rope_dim for spec in specs]),
        kv_lora_rank=[spec.rank for spec in specs],
        rotate_at=_same([spec.rotate_at for spec in specs]),
        rope_selection=config.rope_selection if drops_pairs else None,
        folded=config.fold and drops_pairs,
        predicted_kl=[option.loss for _, option in best],
    )


def least_decode_cost(mla: MLAConfig, sizes: AttentionSizes, config: ConversionConfig) -> float:
    """The least arithmetic of any modes and sizes within the budget."""
    flat = LayerLosses(rope={1: 0.0}, latent={1: 0.0}, read={1: 0.0})
    found = []
    for options, units in _ways(mla, [flat] * sizes.layers, sizes, config):
        with contextlib.suppress(ValueError):
            found.append(least_work([list(layer.values()) for layer in options], units))
    return min(found) / sizes.layers


Options = dict[LayerSpec, Option]


def _ways(
    mla: MLAConfig, losses: Sequence[LayerLosses], sizes: AttentionSizes, config: ConversionConfig
) -> list[tuple[list[Options], int]]:
    """Options of each layer and the units that they may take: all at write; any, of what positions leave."""
    spec = mla.layer(0)
    assert spec is not None, "all layers are converted"
    write = [_write_options(spec, layer, sizes) for layer in losses]
    both = [a | _read_options(spec, b, sizes) for a, b in zip(write, losses, strict=True)]
    finer = dims_in_unit(sizes, "write") // dims_in_unit(sizes, "read")
    alone, mixed = (budget_units(sizes, config.of(mode)) for mode in ("write", "read"))
    return [(write, finer * alone), (both, mixed)]


def _write_options(spec: LayerSpec, layer: LayerLosses, sizes: AttentionSizes) -> Options:
    unit, finer = dims_in_unit(sizes, "write"), dims_in_unit(sizes, "read")
    rope, latent = _curves(layer, sizes)
    options = {}
    for a, b in itertools.product(rope, latent):
        made = replace(spec, rope_dim=a * unit, rank=b * unit * sizes.kv_heads, rotate_at="write")
        work = made.products(sizes) / sizes.products
        options[made] = Option((a + b) * unit // finer, work, rope[a] + latent[b])
    return options


def _read_options(spec: LayerSpec, layer: LayerLosses, sizes: AttentionSizes) -> Options:
    unit, options = dims_in_unit(sizes, "read"), {}
    for units, loss in _read_curve(layer, sizes).items():
        rank = units * unit * sizes.kv_heads
        made = replace(spec, rope_dim=sizes.head_dim, rank=rank, rotate_at="read")
        options[made] = Option(units, made.products(sizes) / sizes.products, loss)
    return options


def _loss(chosen: Sequence[tuple[LayerSpec, Option]]) -> float:
    return sum(option.loss for _, option in chosen)


def _same(values: list[Any]) -> Any:
    """The one value of all layers, or each layer's."""
    return values[0] if len(set(values)) == 1 else values
