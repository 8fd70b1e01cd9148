"""Sizes of each layer under a budget of the cache, by what converting layers was predicted to cost."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from mha2mla_vlm.algorithms.budget import Curve, allocate, interpolate, unit_dims
from mha2mla_vlm.config import AttentionSizes, MLAConfig
from mha2mla_vlm.conversion.config import ConversionConfig

ROPE_UNITS = (1, 2, 4, 6, 8, 10, 12, 14)  # of 16, tried
LATENT_UNITS = (1, 2, 3, 4, 6, 8, 12)


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


def tried_units(sizes: AttentionSizes) -> tuple[list[int], list[int]]:
    """Units of rope dims and of latent dims at which losses are measured."""
    unit = unit_dims(sizes.head_dim)
    most = most_latent(sizes, sizes.head_dim // 2)
    rope = [units for units in ROPE_UNITS if units * unit < sizes.head_dim]
    return rope, [units for units in LATENT_UNITS if units * unit <= most]


def most_latent(sizes: AttentionSizes, rope_dim: int) -> int:
    """Largest d_kv at a number of rope dims."""
    return min(sizes.hidden // sizes.kv_heads, 2 * sizes.head_dim - rope_dim)


def budget_units(sizes: AttentionSizes, config: ConversionConfig) -> int:
    """The budget in units of `budget.unit_dims`, over all layers."""
    whole = 2 * sizes.head_dim * sizes.layers / unit_dims(sizes.head_dim)
    return int((config.share or 0.0) * whole + 1e-9)


def allocated(
    mla: MLAConfig, losses: Sequence[LayerLosses], sizes: AttentionSizes, config: ConversionConfig
) -> MLAConfig:
    """`mla` with the sizes of each layer that cost least together under the budget of `config`."""
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
