"""What calibration tells about an original model: enough to convert any of its layers to any size.

Shapes: G KV heads, D head dim, P = D / 2 pairs, R rope dims kept.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import BatchFeature, PreTrainedModel

from mha2mla_vlm.allotment import Curve, Sizes, allot, exchanges, interpolate, unit_dims
from mha2mla_vlm.attention import MLAAttention
from mha2mla_vlm.config import SHARED, AttentionSizes, ConversionConfig, MLAConfig
from mha2mla_vlm.families import get_family
from mha2mla_vlm.layerwise import CALIBRATION
from mha2mla_vlm.measuring import measure_layer
from mha2mla_vlm.modeling import decoder_layers
from mha2mla_vlm.probe import Probe
from mha2mla_vlm.progress import track
from mha2mla_vlm.streams import States, begin
from mha2mla_vlm.surgery import (
    converted_layer,
    factored_weights,
    partial_rope_weights,
    table_scale,
)

PROBE_CHATS = 48  # that losses are measured on, the hardest
ROPE_UNITS = (1, 2, 4, 6, 8, 10, 12, 14)  # of 16, measured
LATENT_UNITS = (1, 2, 3, 4, 6, 8, 12)
EXCHANGES = 24  # allotments tried around the predicted best


@dataclass(frozen=True, kw_only=True)
class LayerLosses:
    """KL divergence that converting one layer costs, by units of rope dims and of latent dims."""

    rope: Curve
    latent: Curve


class Profile:
    """Statistics of an original model under calibration chats, for one way of converting it.

    It serves any sizes, so conversions to several budgets share one (`convert(..., profile=...)`).
    """

    def __init__(
        self, model: PreTrainedModel, batches: Sequence[BatchFeature], config: ConversionConfig
    ) -> None:
        self.model, self.batches, self.config = model, batches, config
        self.sizes = AttentionSizes.of(model.config)
        self.visual = get_family(model.config.model_type).visual_token_ids(model.config)
        self.unit = unit_dims(self.sizes.head_dim)
        self._losses: list[LayerLosses] = []
        states: States = {}
        chats = begin(model, batches, self.visual, model.device, states, [CALIBRATION])
        self.layers = [
            measure_layer(layer, chats, states, CALIBRATION, config, total=len(chats), moments=True).check(
                index
            )
            for index, layer in enumerate(track(decoder_layers(model), "calibrating"))
        ]

    def check(self, config: ConversionConfig) -> None:
        """Raise `ValueError` if this is the profile of another method than that of `config`."""
        mine = replace(self.config, budget=config.budget, rope_dim=config.rope_dim, d_kv=config.d_kv)
        if mine != config:
            raise ValueError(f"the profile was made for {self.config}, not for {config}")

    def layer(self, index: int, mla: MLAConfig) -> MLAAttention:
        """A layer's attention converted as `mla` says, alone."""
        source: Any = decoder_layers(self.model)[index].self_attn
        rope_dim, rank = mla.layer(index)
        selection = self.layers[index].selection(rope_dim, self.sizes, self.config)
        weights = partial_rope_weights(source, selection, table_scale(self.model))
        if rank is None:
            return converted_layer(source, weights, replace(mla, modalities=SHARED), index)
        head_dim = self.sizes.head_dim
        factored = factored_weights(weights, self.layers[index].stats, mla, index, head_dim, warn=False)
        return converted_layer(source, factored, mla, index)

    def losses(self, mla: MLAConfig) -> list[LayerLosses]:
        """Measured once: what each layer costs, by units of rope dims alone, and of latent dims beyond
        that at half of the rope dims.
        """
        if not self._losses:
            half = self.sizes.head_dim // 2
            for index in track(range(self.sizes.layers), "measuring what layers cost"):
                rope = {u: self._loss(index, mla, u * self.unit, None) for u in self._rope_units()}
                base = self._loss(index, mla, half, None)
                latent = {
                    u: max(0.0, self._loss(index, mla, half, u * self.unit) - base)
                    for u in LATENT_UNITS
                    if u * self.unit <= self._most_latent(half)
                }
                self._losses.append(LayerLosses(rope=rope, latent=latent))
        return self._losses

    @functools.cached_property
    def _probe(self) -> Probe:
        """The chats that suffer most from partial RoPE at a quarter of the head dim."""
        probe = Probe(self.model, self.batches, self.visual)
        mla = MLAConfig(qk_rope_head_dim=self.sizes.head_dim // 8 * 2)
        probe.keep_hardest({i: self.layer(i, mla) for i in range(self.sizes.layers)}, PROBE_CHATS)
        return probe

    def _rope_units(self) -> list[int]:
        return [units for units in ROPE_UNITS if units * self.unit < self.sizes.head_dim]

    def _most_latent(self, rope_dim: int) -> int:
        """Largest d_kv at a number of rope dims."""
        keys_and_values = 2 * self.sizes.head_dim - rope_dim
        return min(self.sizes.hidden // self.sizes.kv_heads, keys_and_values)

    def _loss(self, index: int, mla: MLAConfig, rope_dim: int, d_kv: int | None) -> float:
        return self._probe.loss({index: self.layer(index, self._sized(mla, rope_dim, d_kv))})

    def _sized(self, mla: MLAConfig, rope_dim: int, d_kv: int | None) -> MLAConfig:
        rank = None if d_kv is None else d_kv * self.sizes.kv_heads
        return replace(mla, qk_rope_head_dim=rope_dim, kv_lora_rank=rank)

    def allot(self, mla: MLAConfig, config: ConversionConfig) -> MLAConfig:
        """`mla` with the sizes of each layer allotted under the budget of `config`.

        First the best by the sum of the measured losses of single layers, then by moving units about
        while the loss measured with all layers converted falls.
        """
        rope, latent = self._curves(mla, config)
        chosen = allot(rope, latent, budget_units(self.sizes, config))
        chosen = self._improve(chosen, mla, rope, latent)
        predicted = [r[a] + c[b] for (a, b), r, c in zip(chosen, rope, latent, strict=True)]
        return replace(
            mla,
            qk_rope_head_dim=[a * self.unit for a, _ in chosen],
            kv_lora_rank=[b * self.unit * self.sizes.kv_heads for _, b in chosen],
            predicted_kl=predicted,
        )

    def _curves(
        self, mla: MLAConfig, config: ConversionConfig
    ) -> tuple[list[dict[int, float]], list[dict[int, float]]]:
        """Losses by units for every layer, rope and latent; one size alone where it is given."""
        rope, latent = [], []
        whole = self.sizes.head_dim // self.unit
        for losses in self.losses(mla):
            rope.append(interpolate(losses.rope, whole - 1) | {whole: 0.0})
            latent.append(
                interpolate(losses.latent, min(whole, self._most_latent(self.sizes.head_dim) // self.unit))
            )
        if config.rope_dim is not None:
            rope = [{config.rope_dim // self.unit: 0.0}] * len(rope)
        if config.d_kv is not None:
            latent = [{config.d_kv // self.unit: 0.0}] * len(latent)
        return rope, latent

    def _improve(
        self,
        chosen: list[Sizes],
        mla: MLAConfig,
        rope: list[dict[int, float]],
        latent: list[dict[int, float]],
    ) -> list[Sizes]:
        made: dict[tuple[int, Sizes], MLAAttention] = {}

        def measured(sizes: list[Sizes]) -> float:
            for index, (a, b) in enumerate(sizes):
                if (index, (a, b)) not in made:
                    made[index, (a, b)] = self.layer(index, self._sized(mla, a * self.unit, b * self.unit))
            return self._probe.loss({index: made[index, size] for index, size in enumerate(sizes)})

        best, left, tried = measured(chosen), EXCHANGES, {tuple(chosen)}
        found = True
        while found and left:
            found = False
            for candidate in exchanges(chosen, rope, latent):
                if tuple(candidate) in tried or not left:
                    continue
                tried.add(tuple(candidate))
                left -= 1
                if (loss := measured(candidate)) < best:
                    chosen, best, found = candidate, loss, True
                    break
        return chosen


def budget_units(sizes: AttentionSizes, config: ConversionConfig) -> int:
    """The budget in units of `allotment`, over all layers."""
    whole = 2 * sizes.head_dim * sizes.layers / unit_dims(sizes.head_dim)
    return int((config.share or 0.0) * whole + 1e-9)
