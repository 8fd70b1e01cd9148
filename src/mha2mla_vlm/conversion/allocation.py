"""Sizes of each layer under a budget of the cache, by what converting layers was predicted to cost."""

import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from mha2mla_vlm.algorithms.budget import Curve, Option, allocate, choose, interpolate, least_work, unit_dims
from mha2mla_vlm.config import POSITION_BYTES, AttentionSizes, LatentBits, LayerSpec, MLAConfig
from mha2mla_vlm.conversion.config import AUTO, ConversionConfig
from mha2mla_vlm.errors import InputError

ROPE_UNITS = (1, 2, 4, 6, 8, 10, 12, 14)  # of 16, tried
LATENT_UNITS = (1, 2, 3, 4, 6, 8, 12)
READ_UNITS = (2, 4, 6, 8, 12, 16, 24, 32, 48)  # of 32, where keys are made of latents too
BY_CHANNEL_UNITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of 32 in bytes, where channels differ in bits

BitsBySize = dict[int, LatentBits]
Options = dict[LayerSpec, Option]


@dataclass(frozen=True, kw_only=True)
class LayerLosses:
    """KL divergence that converting only one layer costs, predicted by `sensitivity`: by units of rope dims,
    and of latent dims beyond that at half of the rope dims; and, rotated at read, by units of latent dims.
    `by_channel` are by mode those of latents whose channels differ in `bits`, by units too, which are bytes.
    """

    rope: Curve = field(default_factory=dict)
    latent: Curve = field(default_factory=dict)
    read: Curve = field(default_factory=dict)
    by_channel: Mapping[str, Curve] = field(default_factory=dict)
    bits: Mapping[str, BitsBySize] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, dict[str, Any]]) -> Self:
        """From plain values."""
        rope, latent, read = ({int(k): v for k, v in values[n].items()} for n in ("rope", "latent", "read"))
        by_channel = {m: {int(k): v for k, v in curve.items()} for m, curve in values["by_channel"].items()}
        bits = {m: {int(k): LatentBits(*v) for k, v in sizes.items()} for m, sizes in values["bits"].items()}
        return cls(rope=rope, latent=latent, read=read, by_channel=by_channel, bits=bits)


def dims_in_unit(sizes: AttentionSizes, config: ConversionConfig) -> int:
    """Dims per KV head, of 16 bits, that the budget is allocated in: finer where all are latent dims, and
    where bits are chosen, for there rotated keys have 8.
    """
    fine = config.at_read or config.bits_by_channel
    return unit_dims(sizes.head_dim) // (2 if fine else 1)


def tried_units(sizes: AttentionSizes, config: ConversionConfig) -> dict[str, list[int]]:
    """Units at which losses are measured for one mode, by the names of the curves in `LayerLosses`."""
    unit, tried = dims_in_unit(sizes, config), {}
    if not config.at_read:
        coarse = unit_dims(sizes.head_dim)
        tried["rope"] = [units for units in ROPE_UNITS if units * coarse < sizes.rotary_dim]
    at = BY_CHANNEL_UNITS if config.bits_by_channel else READ_UNITS if config.at_read else LATENT_UNITS
    most = most_latent(sizes, 0 if config.at_read else measured_rope_dim(sizes)) // unit
    tried["read" if config.at_read else "latent"] = [units for units in at if units <= most]
    return tried


def measured_rope_dim(sizes: AttentionSizes) -> int:
    """R at which losses of latents are measured: about half of the dims that the original rotates."""
    return max(2, sizes.rotary_dim // 4 * 2)


def most_latent(sizes: AttentionSizes, rope_dim: int) -> int:
    """Largest d_kv where a number of rope dims is cached beside the latent."""
    return min(sizes.most_latent_dims // sizes.kv_heads, 2 * sizes.head_dim - rope_dim)


def budget_units(sizes: AttentionSizes, config: ConversionConfig) -> int:
    """The budget in units of `dims_in_unit`, over all layers; positions, if they are kept, come out of it."""
    kept = (config.share or 0.0) * 2 * sizes.head_dim * len(sizes.growing)
    if config.at_read:  # as numbers of 16 bits
        kept -= POSITION_BYTES / 2 * sizes.position_axes / sizes.kv_heads
    return int(kept / dims_in_unit(sizes, config) + 1e-9)


def allocated(
    mla: MLAConfig, losses: Sequence[LayerLosses], sizes: AttentionSizes, config: ConversionConfig
) -> MLAConfig:
    """`mla` with the sizes of each layer that cost least together under the budget of `config`.

    Layers that stay as they were take no part in it.
    """
    losses = [losses[index] for index in sizes.growing]
    if config.rotate_at == AUTO or config.bits_by_channel:
        return _allocated_specs(mla, losses, sizes, config).over_all(sizes)
    if config.at_read:
        return _allocated_latents(mla, losses, sizes, config).over_all(sizes)
    return _allocated_sizes(mla, losses, sizes, config).over_all(sizes)


def _allocated_sizes(
    mla: MLAConfig, losses: Sequence[LayerLosses], sizes: AttentionSizes, config: ConversionConfig
) -> MLAConfig:
    """The same where keys are rotated at write."""
    unit = unit_dims(sizes.head_dim)
    rope = [_rope_curve(layer, sizes) for layer in losses]
    latent = [_latent_curve(layer, sizes, config) for layer in losses]
    if config.qk_rope_head_dim is not None:
        rope = [{config.qk_rope_head_dim // unit: 0.0}] * len(rope)
    if config.d_kv is not None:
        latent = [{config.d_kv // unit: 0.0}] * len(latent)
    chosen = allocate(rope, latent, budget_units(sizes, config))
    return replace(
        mla,
        qk_rope_head_dim=[a * unit for a, _ in chosen],
        kv_lora_rank=[b * unit * sizes.kv_heads for _, b in chosen],
        predicted_kl=[r[a] + c[b] for (a, b), r, c in zip(chosen, rope, latent, strict=True)],
    )


def _rope_curve(layer: LayerLosses, sizes: AttentionSizes) -> dict[int, float]:
    """Losses of a layer by units of rope dims."""
    whole = sizes.rotary_dim // unit_dims(sizes.head_dim)
    return interpolate(layer.rope, whole - 1) | {whole: 0.0}


def _latent_curve(layer: LayerLosses, sizes: AttentionSizes, config: ConversionConfig) -> dict[int, float]:
    """Losses of a layer by units of latent dims, or of bytes where channels differ in bits."""
    if config.bits_by_channel:
        mode = config.rotate_at
        return interpolate(layer.by_channel[mode], max(layer.bits[mode]))
    rope_dim, curve = (0, layer.read) if config.at_read else (sizes.rotary_dim, layer.latent)
    return interpolate(curve, most_latent(sizes, rope_dim) // dims_in_unit(sizes, config))


def _allocated_latents(
    mla: MLAConfig, losses: Sequence[LayerLosses], sizes: AttentionSizes, config: ConversionConfig
) -> MLAConfig:
    """The same where keys are rotated at read: all is latent dims."""
    unit = dims_in_unit(sizes, config)
    curves = [_latent_curve(layer, sizes, config) for layer in losses]
    chosen = allocate([{0: 0.0}] * len(curves), curves, budget_units(sizes, config))
    return replace(
        mla,
        kv_lora_rank=[units * unit * sizes.kv_heads for _, units in chosen],
        predicted_kl=[curve[units] for (_, units), curve in zip(chosen, curves, strict=True)],
    )


def _allocated_specs(
    mla: MLAConfig, losses: Sequence[LayerLosses], sizes: AttentionSizes, config: ConversionConfig
) -> MLAConfig:
    """The same where each layer may be rotated at write or at read, within the limit of arithmetic too, or
    where its channels differ in bits.
    """
    best: list[tuple[LayerSpec, Option]] = []
    for options, units in _ways(mla, losses, sizes, config):
        listed = [list(layer.items()) for layer in options]
        given = ([[option for _, option in layer] for layer in listed], units)
        try:
            numbers = choose(*given, (config.max_decode_cost or math.inf) * len(losses))
        except ValueError:
            continue
        found = [layer[number] for layer, number in zip(listed, numbers, strict=True)]
        if not best or _loss(found) < _loss(best):
            best = found
    if not best:
        raise InputError(
            f"nothing is within a budget of {config.share:.4g} and a max_decode_cost of "
            f"{config.max_decode_cost}; give more of either"
        )
    specs = [spec for spec, _ in best]
    drops_pairs = any(not spec.at_read for spec in specs)
    bits = [None if spec.bits is None else list(spec.bits) for spec in specs]
    return replace(
        mla,
        qk_rope_head_dim=_same([spec.rope_dim for spec in specs]),
        kv_lora_rank=[spec.rank for spec in specs],
        rotate_at=_same([spec.rotate_at for spec in specs]),
        latent_bits=bits if any(bits) else None,
        kv_bias=mla.kv_bias or any(bits),
        rope_selection=config.rope_selection if drops_pairs else None,
        folded=config.fold and drops_pairs,
        predicted_kl=[option.loss for _, option in best],
    )


def least_decode_cost(mla: MLAConfig, sizes: AttentionSizes, config: ConversionConfig) -> float:
    """The least arithmetic of any modes and sizes within the budget; of any 4 bits, where they are chosen."""
    unit = 2 * dims_in_unit(sizes, config) * sizes.kv_heads  # bytes
    bits = {1: LatentBits(0, 0, 2 * unit, 0)}
    by_mode = dict.fromkeys(config.modes, bits)
    curve = {1: 0.0}
    flat = LayerLosses(
        rope=curve, latent=curve, read=curve, by_channel=dict.fromkeys(config.modes, curve), bits=by_mode
    )
    found = []
    layers = len(sizes.growing)
    for options, units in _ways(mla, [flat] * layers, sizes, config):
        with contextlib.suppress(ValueError):
            found.append(least_work([list(layer.values()) for layer in options], units))
    return min(found) / layers


def _ways(
    mla: MLAConfig, losses: Sequence[LayerLosses], sizes: AttentionSizes, config: ConversionConfig
) -> list[tuple[list[Options], int]]:
    """Options of each layer and the finest units that they take at most: all at write; any. Of modes that
    were measured.
    """
    spec, finest = mla.layer(sizes.growing[0]), unit_dims(sizes.head_dim) // 2
    assert spec is not None, "a layer that is converted"
    ways, found = [], [Options() for _ in losses]
    for mode, options in (("write", _write_options), ("read", _read_options)):
        if mode in config.modes and not (config.bits_by_channel and mode not in losses[0].bits):
            own = config.of(mode)
            found = [a | options(spec, b, sizes, own) for a, b in zip(found, losses, strict=True)]
            ways.append((found, budget_units(sizes, own) * dims_in_unit(sizes, own) // finest))
    return ways


def _write_options(
    spec: LayerSpec, layer: LayerLosses, sizes: AttentionSizes, config: ConversionConfig
) -> Options:
    coarse, options = unit_dims(sizes.head_dim), Options()
    rope, latent = _rope_curve(layer, sizes), _latent_curve(layer, sizes, config)
    for a, b in itertools.product(rope, latent):
        sized = _of_size(spec, layer, b, sizes, config)
        made = replace(sized, rope_dim=a * coarse)
        if config.qk_rope_head_dim in (None, made.rope_dim) and made.fits(sizes):
            units = a + b if config.bits_by_channel else 2 * (a + b)
            options[made] = Option(units, made.products(sizes) / sizes.products, rope[a] + latent[b])
    return options


def _read_options(
    spec: LayerSpec, layer: LayerLosses, sizes: AttentionSizes, config: ConversionConfig
) -> Options:
    options = Options()
    for units, loss in _latent_curve(layer, sizes, config).items():
        sized = _of_size(spec, layer, units, sizes, config)
        made = replace(sized, rope_dim=config.qk_rope_head_dim or sizes.rotary_dim)
        options[made] = Option(units, made.products(sizes) / sizes.products, loss)
    return options


def _of_size(
    spec: LayerSpec, layer: LayerLosses, units: int, sizes: AttentionSizes, config: ConversionConfig
) -> LayerSpec:
    """A layer's spec with a latent of some units, each of numbers of 16 bits or of as many bytes."""
    mode = config.rotate_at
    if not config.bits_by_channel:
        return replace(spec, rank=units * dims_in_unit(sizes, config) * sizes.kv_heads, rotate_at=mode)
    bits = layer.bits[mode][units]
    return replace(spec, rank=bits.rank, bits=bits, bias=True, rotate_at=mode)


def _loss(chosen: Sequence[tuple[LayerSpec, Option]]) -> float:
    return sum(option.loss for _, option in chosen)


def _same(values: list[Any]) -> Any:
    """The one value of all layers, or each layer's."""
    return values[0] if len(set(values)) == 1 else values
