"""Sizes of each layer under a budget of the cache, by what converting layers was predicted to cost."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from mha2mla_vlm.algorithms.budget import Curve, allocate, interpolate, unit_dims
from mha2mla_vlm.config import POSITION_BYTES, AttentionSizes, MLAConfig
from mha2mla_vlm.conversion.config import ConversionConfig

ROPE_UNITS = (1, 2, 4, 6, 8, 10, 12, 14)  # of 16, tried
LATENT_UNITS = (1, 2, 3, 4, 6, 8, 12)
READ_UNITS = (2, 4, 6, 8, 12, 16, 24, 32, 48)  # of 32, where keys are made of latents too


@dataclass(frozen=True, kw_only=True)
class LayerLosses:
    """KL divergence that converting only one layer costs, predicted by `sensitivity`: by units of rope dims,
    and of latent dims beyond that at half of the rope dims.
    """

    rope: Curve
    latent: Curve

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, dict[str, float]]) -> Self:
        """From plain values."""
        return cls(**{name: {int(k): v for k, v in curve.items()} for name, curve in values.items()})


def dims_in_unit(sizes: AttentionSizes, *, at_read: bool) -> int:
    """Dims per KV head that the budget is allocated in: finer where all are latent dims."""
    return unit_dims(sizes.head_dim) // (2 if at_read else 1)


def tried_units(sizes: AttentionSizes, *, at_read: bool) -> tuple[list[int], list[int]]:
    """Units of rope dims and of latent dims at which losses are measured."""
    unit = dims_in_unit(sizes, at_read=at_read)
    if at_read:
        return [], [units for units in READ_UNITS if units * unit <= most_latent(sizes, 0)]
    most = most_latent(sizes, sizes.head_dim // 2)
    rope = [units for units in ROPE_UNITS if units * unit < sizes.head_dim]
    return rope, [units for units in LATENT_UNITS if units * unit <= most]


def most_latent(sizes: AttentionSizes, rope_dim: int) -> int:
    """Largest d_kv where a number of rope dims is cached beside the latent."""
    return min(sizes.hidden // sizes.kv_heads, 2 * sizes.head_dim - rope_dim)


def budget_units(sizes: AttentionSizes, config: ConversionConfig) -> int:
    """The budget in units of `dims_in_unit`, over all layers; positions, if they are kept, come out of it."""
    kept = (config.share or 0.0) * 2 * sizes.head_dim * sizes.layers
    if config.at_read:  # as numbers of 16 bits
        kept -= POSITION_BYTES / 2 * sizes.position_axes / sizes.kv_heads
    return int(kept / dims_in_unit(sizes, at_read=config.at_read) + 1e-9)


def allocated(
    mla: MLAConfig, losses: Sequence[LayerLosses], sizes: AttentionSizes, config: ConversionConfig
) -> MLAConfig:
    """`mla` with the sizes of each layer that cost least together under the budget of `config`."""
    if config.at_read:
        return _allocated_latents(mla, losses, sizes, config)
    unit = unit_dims(sizes.head_dim)
    whole = sizes.head_dim // unit
    most = min(whole, most_latent(sizes, sizes.head_dim) // unit)
    rope = [interpolate(layer.rope, whole - 1) | {whole: 0.0} for layer in losses]
    latent = [interpolate(layer.latent, most) for layer in losses]
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


def _allocated_latents(
    mla: MLAConfig, losses: Sequence[LayerLosses], sizes: AttentionSizes, config: ConversionConfig
) -> MLAConfig:
    """The same where keys are rotated at read: all is latent dims."""
    unit = dims_in_unit(sizes, at_read=True)
    curves = [interpolate(layer.latent, most_latent(sizes, 0) // unit) for layer in losses]
    chosen = allocate([{0: 0.0}] * len(curves), curves, budget_units(sizes, config))
    return replace(
        mla,
        kv_lora_rank=[units * unit * sizes.kv_heads for _, units in chosen],
        predicted_kl=[curve[units] for (_, units), curve in zip(chosen, curves, strict=True)],
    )
