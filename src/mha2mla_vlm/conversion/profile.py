"""What calibration tells about an original model: enough to convert its layers to any sizes.

Shapes: G KV heads, D head dim, P = D / 2 pairs, R rope dims kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, Self

import torch
from transformers import BatchFeature, PreTrainedModel

from mha2mla_vlm.algorithms.budget import Curve, allot, interpolate, unit_dims
from mha2mla_vlm.calibration.activations import Chat, MemoryStates, States, begin
from mha2mla_vlm.calibration.layer_profile import LayerProfile, measure_layer
from mha2mla_vlm.calibration.sensitivity import begin_gradients, project_errors
from mha2mla_vlm.config import BLOCKS, AttentionSizes, ConversionConfig, MLAConfig
from mha2mla_vlm.conversion.weights import (
    converted_layer,
    factored_weights,
    layer_factors,
    partial_layer,
    table_scale,
)
from mha2mla_vlm.model.attention import MLAAttention
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.model.offload import resident
from mha2mla_vlm.utils.distributed import own_share, sum_over_processes
from mha2mla_vlm.utils.progress import Phases

CALIBRATION = "calibration"  # a stream through the original layers
SKETCHES = 2  # of each chat's answers
ROPE_UNITS = (1, 2, 4, 6, 8, 10, 12, 14)  # of 16, tried
LATENT_UNITS = (1, 2, 3, 4, 6, 8, 12)


@dataclass(frozen=True, kw_only=True)
class LayerLosses:
    """KL divergence that converting one layer alone costs, foretold by `sensitivity`: by units of rope dims,
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


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Of every layer, what calibration found and, for methods that take a budget, what converting it costs.

    It serves any sizes, so conversions to several budgets share one (`convert(..., profile=...)`).
    """

    config: ConversionConfig
    layers: Sequence[LayerProfile]
    losses: Sequence[LayerLosses]

    def check(self, config: ConversionConfig) -> None:
        """Raise `ValueError` if this is the profile of another method than that of `config`."""
        mine = replace(self.config, budget=config.budget, rope_dim=config.rope_dim, d_kv=config.d_kv)
        if mine != config:
            raise ValueError(f"the profile was made for {self.config}, not for {config}")


class Work(Protocol):
    """Where measuring keeps what it needs: steps `done`, `notes` of what they found, and hidden states."""

    done: int
    notes: dict[str, Any]
    states: States

    def keep(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors under a name."""

    def kept(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors that were kept."""

    def finished_step(self, *, drop: int | None = None) -> None:
        """One more step is done; the states before layer `drop` are not needed any more."""


class MemoryWork:
    """Keeps all in memory."""

    def __init__(self) -> None:
        self.done = 0
        self.notes: dict[str, Any] = {}
        self.states: States = MemoryStates()
        self._kept: dict[str, Mapping[str, torch.Tensor]] = {}

    def keep(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors under a name."""
        self._kept[name] = tensors

    def kept(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors that were kept."""
        return dict(self._kept[name])

    def finished_step(self, *, drop: int | None = None) -> None:
        """One more step is done."""
        self.done += 1
        if drop is not None:
            self.states.drop(drop)


class LayerwiseProfile:
    """Measures the layers of an original `model`, which may lie on disk, for conversion as `mla` and `config`
    say. What is found stays in `work`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: ConversionConfig,
        mla: MLAConfig,
        *,
        device: torch.device,
        phases: Phases,
        work: Work,
    ) -> None:
        self.model, self.config, self.mla, self.device = model, config, mla, device
        self.phases, self.work, self.states = phases, work, work.states
        self.sizes = AttentionSizes.of(model.config)
        self.unit = unit_dims(self.sizes.head_dim)
        self.chats: list[Chat] = []
        self.total = 0

    def run(self, batches: Sequence[BatchFeature]) -> None:
        """Up through the layers, a step for each, to find what the chats tell about it (`layer`); then down
        again, if the method takes a budget, to find what converting each costs (`losses`).
        """
        layers, work = self.sizes.layers, self.work
        if work.done >= 2 * layers:
            return
        self._begin(batches)
        for index in range(work.done, layers):
            work.keep(f"layer {index}", self._measure(index).tensors())
            self._finished()
        if self.mla.factorization in ("none", *BLOCKS):
            return
        if work.done == layers:
            with self.phases.phase("sensitivity"):
                begin_gradients(self.model, self.chats, self.states, CALIBRATION, sketches=SKETCHES)
        for index in reversed(range(2 * layers - work.done)):
            losses = self._losses(index, self.layer(index))
            work.notes["losses"] = [losses.to_dict(), *work.notes.get("losses", [])]
            self._finished(drop=index + 1)

    def _finished(self, *, drop: int | None = None) -> None:
        self.work.finished_step(drop=drop)
        self.phases.advance()

    def layer(self, index: int) -> LayerProfile:
        """What was found of a layer."""
        tensors = self.work.kept(f"layer {index}")
        return LayerProfile.from_tensors({k: v.to(self.device) for k, v in tensors.items()})

    def losses(self) -> list[LayerLosses]:
        """What converting each layer was found to cost, where that was measured."""
        return [LayerLosses.from_dict(values) for values in self.work.notes.get("losses", [])]

    def _begin(self, batches: Sequence[BatchFeature]) -> None:
        """Bring this process's share of the chats before the first layer, if they are not beyond."""
        self.total = len(batches)
        visual = get_family(self.model.config.model_type).visual_token_ids(self.model.config)
        streams = [] if self.work.done else [CALIBRATION]
        with self.phases.phase("vision and embeddings"):
            self.chats = begin(self.model, own_share(batches), visual, self.device, self.states, streams)

    @torch.no_grad()
    def _measure(self, index: int) -> LayerProfile:
        """Take the chats through a layer; raises `InputError` naming it for numbers that are not finite."""
        layer = decoder_layers(self.model)[index]
        with self.phases.phase("calibration"), resident(layer.modules(), self.device):
            given = (layer, index, self.chats, self.states, CALIBRATION, self.config)
            return measure_layer(*given, total=self.total, moments=True).check(index)

    @torch.no_grad()
    def _losses(self, index: int, profile: LayerProfile) -> LayerLosses:
        """What converting a layer costs."""
        layer = decoder_layers(self.model)[index]
        rope_units, latent_units = _tried_units(self.sizes, self.unit)
        with resident(layer.modules(), self.device):
            with self.phases.phase("tried sizes"):
                tried = [self._partial(layer.self_attn, profile, index, u * self.unit) for u in rope_units]
                tried += self._factored(layer.self_attn, profile, index, latent_units)
            with self.phases.phase("sensitivity"):
                found = project_errors(layer, index, self.chats, self.states, CALIBRATION, tried)
        rope, half, latent = found.split([len(rope_units), 1, len(latent_units)])
        losses = torch.cat([rope, latent - half]).square().sum((1, 2)) / (2 * SKETCHES)
        answers = losses.new_tensor(sum(int(chat.answers.sum()) for chat in self.chats))
        sum_over_processes([losses, answers])
        values = (losses / answers).tolist()
        return LayerLosses(
            rope=dict(zip(rope_units, values, strict=False)),
            latent=dict(zip(latent_units, values[len(rope_units) :], strict=True)),
        )

    def _partial(self, source: Any, profile: LayerProfile, index: int, rope_dim: int) -> MLAAttention:
        selection = profile.selection(rope_dim, self.sizes, self.config)
        mla = replace(self.mla, qk_rope_head_dim=rope_dim)
        return partial_layer(source, selection, mla, index, table_scale(self.model))

    def _factored(
        self, source: Any, profile: LayerProfile, index: int, latent_units: Sequence[int]
    ) -> list[MLAAttention]:
        """The layer with half of its rope dims, whole and at each number of latent dims."""
        half = self.sizes.head_dim // 2
        partial = self._partial(source, profile, index, half)
        whole = partial.state_dict()
        ranks = [units * self.unit * self.sizes.kv_heads for units in latent_units]
        mla = replace(self.mla, qk_rope_head_dim=half, kv_lora_rank=ranks[-1])
        given = (whole, profile.stats, mla, index, self.sizes.head_dim)
        factors, made = layer_factors(*given, warn=False), [partial]
        for rank in ranks:
            weights = factored_weights(whole, {k: factor.of_rank(rank) for k, factor in factors.items()})
            made.append(converted_layer(source, weights, replace(mla, kv_lora_rank=rank), index))
        return made


def _tried_units(sizes: AttentionSizes, unit: int) -> tuple[list[int], list[int]]:
    """Units of rope dims and of latent dims at which losses are measured."""
    most = most_latent(sizes, sizes.head_dim // 2)
    rope = [units for units in ROPE_UNITS if units * unit < sizes.head_dim]
    return rope, [units for units in LATENT_UNITS if units * unit <= most]


def most_latent(sizes: AttentionSizes, rope_dim: int) -> int:
    """Largest d_kv at a number of rope dims."""
    return min(sizes.hidden // sizes.kv_heads, 2 * sizes.head_dim - rope_dim)


def allotted(
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
    chosen = allot(rope, latent, budget_units(sizes, config))
    return replace(
        mla,
        qk_rope_head_dim=[a * unit for a, _ in chosen],
        kv_lora_rank=[b * unit * sizes.kv_heads for _, b in chosen],
        predicted_kl=[r[a] + c[b] for (a, b), r, c in zip(chosen, rope, latent, strict=True)],
    )


def budget_units(sizes: AttentionSizes, config: ConversionConfig) -> int:
    """The budget in units of `budget.unit_dims`, over all layers."""
    whole = 2 * sizes.head_dim * sizes.layers / unit_dims(sizes.head_dim)
    return int((config.share or 0.0) * whole + 1e-9)
