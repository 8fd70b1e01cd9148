"""What calibration shows about an original model: enough to convert its layers to any sizes.

Shapes: R rope dims kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from transformers import BatchFeature

from mha2mla_vlm.algorithms.bits import best_bits, importance, in_steps
from mha2mla_vlm.algorithms.budget import unit_dims
from mha2mla_vlm.algorithms.factorization.low_rank import Factors
from mha2mla_vlm.calibration.activations import Chat, advance
from mha2mla_vlm.calibration.layer_profile import LayerProfile, measure_layer
from mha2mla_vlm.calibration.sensitivity import begin_gradients, project_errors
from mha2mla_vlm.config import LayerSpec
from mha2mla_vlm.conversion.allocation import (
    BitsBySize,
    LayerLosses,
    dims_in_unit,
    measured_rope_dim,
    tried_units,
)
from mha2mla_vlm.conversion.config import SIXTEEN, ConversionConfig
from mha2mla_vlm.conversion.sweep import CALIBRATION, Sweep
from mha2mla_vlm.conversion.weights import converted_layer, factored_weights, keys_in_steps
from mha2mla_vlm.conversion.work import Work
from mha2mla_vlm.model.attention import MLAAttention
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.model.offload import resident
from mha2mla_vlm.utils.distributed import SharedSums

SKETCHES = 2  # of each chat's answers
ROPE, CHANNELS = "rope", " by channel"  # curves are of rope dims, or of a mode's latents
Tried = dict[tuple[str, int], MLAAttention]  # by curve and units


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Of every layer, what calibration found and, for methods that take a budget, what converting it costs.

    It serves any sizes, so conversions to several budgets share one (`convert(..., profile=...)`); one made
    for `rotate_at` "auto" serves "write" and "read" too, and one for `latent_bits` "auto" "16" and "mixed".
    """

    config: ConversionConfig
    layers: Sequence[LayerProfile]
    losses: Sequence[LayerLosses]

    def check(self, config: ConversionConfig) -> None:
        """Raise `ValueError` if this is the profile of another method than that of `config`."""
        known = {self.config.rotate_at: self.config} | {m: self.config.of(m) for m in self.config.modes}
        found = known.get(config.rotate_at)
        measured = set(config.tried_bits) <= set(self.config.tried_bits)
        if found is None or not measured or _of_any_size(found) != _of_any_size(config):
            raise ValueError(f"the profile was made for {self.config}, not for {config}")


def _of_any_size(config: ConversionConfig) -> ConversionConfig:
    return replace(
        config, budget=None, qk_rope_head_dim=None, d_kv=None, max_decode_cost=None, latent_bits=SIXTEEN
    )


class KeptLayers(Sequence[LayerProfile]):
    """What was found of each layer, read from `work` when it is asked for."""

    def __init__(self, work: Work, layers: int, device: torch.device) -> None:
        self.work, self.layers, self.device = work, layers, device

    def __len__(self) -> int:
        return self.layers

    @overload
    def __getitem__(self, index: int) -> LayerProfile: ...

    @overload
    def __getitem__(self, index: slice) -> list[LayerProfile]: ...

    def __getitem__(self, index: int | slice) -> LayerProfile | list[LayerProfile]:
        if isinstance(index, slice):
            return [self[each] for each in range(self.layers)[index]]
        tensors = self.work.kept(f"layer {range(self.layers)[index]}")
        return LayerProfile.from_tensors({k: v.to(self.device) for k, v in tensors.items()})


class LayerwiseProfile(Sweep):
    """Measures the layers of an original model."""

    def run(self, batches: Sequence[BatchFeature], config: ConversionConfig) -> Profile:
        """Up through the layers, a step for each, to find what the chats show about it; then down
        again, if the method takes a budget, to find what converting each costs.
        """
        count, work = self.sizes.layers, self.work
        layers = KeptLayers(work, count, self.device)
        if work.done < 2 * count:
            chats = self.chats(batches, [] if work.done else [CALIBRATION])
            for index in range(work.done, count):
                work.keep(f"layer {index}", self._measure(index, chats, len(batches)).tensors())
                self._finished()
            if self.methods.factorization.takes_budget:
                self._run_down(chats, layers, len(batches))
        losses = [LayerLosses.from_dict(values) for values in work.notes.get("losses", [])]
        return Profile(config=config, layers=layers, losses=losses)

    def _run_down(self, chats: Sequence[Chat], layers: Sequence[LayerProfile], total: int) -> None:
        work, count = self.work, self.sizes.layers
        if work.done == count:
            with self.phases.phase("sensitivity"):
                begin_gradients(self.model, chats, self.states, CALIBRATION, sketches=SKETCHES)
        for index in reversed(range(2 * count - work.done)):
            losses = self._losses(index, chats, layers[index], total)
            work.notes["losses"] = [losses.to_dict(), *work.notes.get("losses", [])]
            self._finished(drop=index + 1)

    def _finished(self, *, drop: int | None = None) -> None:
        self.work.finished_step(drop=drop)
        self.phases.advance()

    @torch.no_grad()
    def _measure(self, index: int, chats: Sequence[Chat], total: int) -> LayerProfile:
        """Take the chats through a layer; raises `InputError` naming it for numbers that are not finite."""
        layer = decoder_layers(self.model)[index]
        with self.phases.phase("calibration"), resident(layer.modules(), self.device):
            if self.stays(index):
                advance(layer, index, chats, self.states, CALIBRATION)
                return LayerProfile()
            given = (layer, index, chats, self.states, CALIBRATION, self.methods)
            return measure_layer(*given, total=total, moments=True)

    @torch.no_grad()
    def _losses(self, index: int, chats: Sequence[Chat], profile: LayerProfile, total: int) -> LayerLosses:
        """What converting a layer costs; nothing of one that stays."""
        if self.stays(index):
            return self._gradients_only(index, chats)
        layer, tried, bits = decoder_layers(self.model)[index], Tried(), dict[str, BitsBySize]()
        with resident(layer.modules(), self.device):
            with self.phases.phase("tried sizes"):
                for mode in self.by_mode:
                    tried |= self._tried(layer.self_attn, profile, index, mode, bits)
            with self.phases.phase("sensitivity"):
                given = (layer, index, chats, self.states, CALIBRATION)
                found = project_errors(*given, list(tried.values()))
        rows = dict(zip(tried, found, strict=True))
        errors = {
            (curve, units): row if curve == ROPE else row - rows[curve.partition(" ")[0], 0]
            for (curve, units), row in rows.items()
            if units
        }
        sums, losses = SharedSums(total), torch.stack([*errors.values()]).square().sum(2) / (2 * SKETCHES)
        for chat, column in zip(chats, losses.unbind(1), strict=True):
            sums.add(chat.number, {"losses": column, "answers": chat.answers.sum()})
        whole = sums.over_processes()
        curves: dict[str, dict[int, float]] = {}
        for (curve, units), value in zip(errors, (whole["losses"] / whole["answers"]).tolist(), strict=True):
            curves.setdefault(curve, {})[units] = value
        return LayerLosses(
            rope=curves.get(ROPE, {}),
            latent=curves.get("write", {}),
            read=curves.get("read", {}),
            by_channel={mode: curves[mode + CHANNELS] for mode in bits},
            bits=bits,
        )

    def _gradients_only(self, index: int, chats: Sequence[Chat]) -> LayerLosses:
        layer = decoder_layers(self.model)[index]
        with self.phases.phase("sensitivity"), resident(layer.modules(), self.device):
            project_errors(layer, index, chats, self.states, CALIBRATION, [])
        return LayerLosses()

    def _tried(
        self, source: Any, profile: LayerProfile, index: int, mode: str, bits: dict[str, BitsBySize]
    ) -> Tried:
        """A layer with each number of rope dims that is tried; with half of them (at read all) and keys and
        values whole, at 0 units of the mode; and so with each size of the latent. Adds to `bits` those of
        channels for every size.
        """
        spec, unit = replace(self.spec(index), rotate_at=mode), unit_dims(self.sizes.head_dim)
        config, made = self.config.of(mode), Tried()
        for number in tried_units(self.sizes, config).get(ROPE, []):
            made[ROPE, number] = self.partial(source, profile, replace(spec, rope_dim=number * unit))
        if not spec.at_read:
            spec = replace(spec, rope_dim=measured_rope_dim(self.sizes))
        made[mode, 0] = partial = self.partial(source, profile, spec)
        whole = self.whole(partial, spec)
        for kept in self.tried_bits(mode):
            own, stats = config.keeping(kept), profile.stats
            units = tried_units(self.sizes, own)["read" if spec.at_read else "latent"]
            numbers = dims_in_unit(self.sizes, own) * self.sizes.kv_heads
            most = replace(spec, rank=units[-1] * numbers)
            factors = self.factors(whole, stats, most, by_importance=own.bits_by_channel)
            curve, before, specs = mode, whole, [replace(spec, rank=size * numbers) for size in units]
            if own.bits_by_channel:  # a unit is as many bytes as its numbers take
                curve, costs = mode + CHANNELS, importance(factors.values())
                bits[mode] = {n: best_bits(costs, 2 * n * numbers) for n in range(1, units[-1] + 1)}
                chosen = [bits[mode][size] for size in units]
                specs = [replace(spec, rank=each.rank, bits=each, bias=True) for each in chosen]
                if not spec.at_read:
                    before = keys_in_steps(whole, stats.pooled(), head_dim=self.sizes.head_dim)
            made |= {
                (curve, size): _of_size(source, before, factors, each)
                for size, each in zip(units, specs, strict=True)
            }
        return made


def _of_size(
    source: Any, whole: dict[str, torch.Tensor], factors: dict[str, Factors], spec: LayerSpec
) -> MLAAttention:
    """A layer with as much of the factors of its keys and values as its spec says."""
    if spec.bits is not None:
        some = {name: in_steps(factor, spec.bits) for name, factor in factors.items()}
    else:
        some = {name: factor.of_rank(int(spec.rank or 0)) for name, factor in factors.items()}
    return converted_layer(source, factored_weights(whole, some), spec)
