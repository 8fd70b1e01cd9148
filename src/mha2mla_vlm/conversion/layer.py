"""The conversion of a model's attention, one layer after the other: what is in memory is one layer at a time.

Chats are taken along in streams of hidden states: those that calibrate through the original layers
(`calibration`) and, for methods that factorise what partial RoPE leaves, through the layers with
partial RoPE (`calibration partial`); those that are held out through the `original`, the `partial` and
the `converted` layers, whose ends give the loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BatchFeature

from mha2mla_vlm.algorithms.bits import in_steps
from mha2mla_vlm.calibration.activations import Chat, advance, answer_states, attending
from mha2mla_vlm.calibration.layer_profile import LayerProfile, measure_layer, measure_moments
from mha2mla_vlm.calibration.statistics import LayerStats
from mha2mla_vlm.conversion.sweep import CALIBRATION, Known, Sweep
from mha2mla_vlm.conversion.weights import converted_layer, factored_weights, keys_in_steps
from mha2mla_vlm.evaluation.answers import as_kl, kl_interval, kl_sum
from mha2mla_vlm.model.attention import MLAAttention
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.model.offload import end_modules, logits_of, resident
from mha2mla_vlm.utils.distributed import SharedSums

CALIBRATION_PARTIAL = "calibration partial"
ORIGINAL, PARTIAL, CONVERTED = "original", "partial", "converted"

Spectrum = list[tuple[int, float]]  # number of a direction, what it carries of what the first does


@dataclass(frozen=True, kw_only=True)
class ConvertedLayer:
    """Parameters of a layer's `MLAAttention` but for those that stay, and spectra by modality."""

    weights: dict[str, torch.Tensor]
    spectra: dict[str, Spectrum]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a conversion loses on held-out chats: mean KL after each transform, its sum in each chat, and how
    many `tokens` of answers each has.
    """

    kl: dict[str, float]
    by_chat: dict[str, list[float]]
    tokens: list[int]

    @property
    def last(self) -> str:
        """The name of the last transform."""
        return list(self.kl)[-1]

    def intervals(self) -> dict[str, list[float]]:
        """95% intervals of KL, by transform."""
        return {name: kl_interval(sums, self.tokens) for name, sums in self.by_chat.items()}

    def said(self, name: str) -> str:
        """A transform's KL in words."""
        low, high = self.intervals()[name]
        return f"KL {self.kl[name]:.4f} ({low:.4f} to {high:.4f})"


def thinned(spectrum: torch.Tensor, points: int = 48) -> Spectrum:
    """A spectrum at some of its places, more of them at its begin."""
    places = torch.logspace(0, math.log10(len(spectrum)), points).round().long().unique()
    values = (spectrum / spectrum[0]).clamp_min(0.0)
    return [(int(place), round(float(values[place - 1]), 9)) for place in places]


class LayerwiseConversion(Sweep):
    """Converts the layers; call `begin`, then `layer` for each in turn.

    `known` gives what calibration found of a layer, where that was measured before; `warn` of modalities
    with too few tokens in calibration.
    """

    def __init__(self, *given: Any, known: Known | None = None, warn: bool = True, **named: Any) -> None:
        super().__init__(*given, **named)
        self.known, self.warn = known, warn
        method = self.methods.factorization
        self.is_original = getattr(self.model.config, "mla", None) is None
        self.factorises = method.factors is not None
        # streams that losses are read from
        modes = {spec.rotate_at for spec in self.mla.layers(self.sizes) if spec}
        drops_pairs = any(self.config.of(mode).drops_pairs for mode in modes)
        self.ends = {"partial_rope": PARTIAL} if self.is_original and drops_pairs else {}
        self.ends |= {"factorization": CONVERTED} if self.factorises else {}
        self.after_rope = method.statistics == "inputs"
        self.calibrating: list[str] = []  # streams
        self.calibration: list[Chat] = []
        self.held_out: list[Chat] = []
        self.total = self.held_out_total = 0

    def begin(
        self, calibration: Sequence[BatchFeature], held_out: Sequence[BatchFeature], *, again: bool = False
    ) -> None:
        """Bring this process's share of the chats before the first layer; or, `again`, only what layers are
        given besides states.
        """
        self.total, self.held_out_total = len(calibration), len(held_out)
        wanted = [CALIBRATION] if self.is_original and self.known is None else []
        wanted += [CALIBRATION_PARTIAL] if self.after_rope else []
        self.calibrating = wanted
        self.calibration = self.chats(calibration, [] if again else wanted) if wanted else []
        self.held_out = self.chats(held_out, [] if again else [ORIGINAL, *self.ends.values()])

    @torch.no_grad()
    def layer(self, index: int) -> ConvertedLayer:
        """Convert a layer; one that stays as it was only takes the chats along.

        Raises `InputError` naming the layer if calibration gives numbers that are not finite.
        """
        layer = decoder_layers(self.model)[index]
        if self.stays(index):
            return self._passed(layer, index)
        with resident(layer.modules(), self.device):
            with self.phases.phase("calibration"):
                profile = self._profile(layer, index)
            with self.phases.phase("partial RoPE"):
                partial = layer.self_attn
                if self.is_original:
                    partial = self.partial(layer.self_attn, profile, self.spec(index))
            stats = profile.stats
            if self.after_rope:
                with self.phases.phase("calibration"), attending(layer, partial):
                    given = (layer, index, self.calibration, self.states, CALIBRATION_PARTIAL)
                    stats = measure_moments(*given, total=self.total)
                LayerProfile(stats=stats).check(index)
            with self.phases.phase("factorisation"):
                converted, spectra = self._factorised(layer.self_attn, partial, stats, index)
            with self.phases.phase("held-out loss"):
                attention = {ORIGINAL: layer.self_attn, PARTIAL: partial, CONVERTED: converted}
                for stream in (ORIGINAL, *self.ends.values()):
                    with attending(layer, attention[stream]):
                        advance(layer, index, self.held_out, self.states, stream)
        return ConvertedLayer(weights=converted.new_weights(), spectra=spectra)

    def _passed(self, layer: nn.Module, index: int) -> ConvertedLayer:
        """A layer that stays as it was, with nothing new."""
        with resident(layer.modules(), self.device):
            with self.phases.phase("calibration"):
                for stream in self.calibrating:
                    advance(layer, index, self.calibration, self.states, stream)
            with self.phases.phase("held-out loss"):
                for stream in (ORIGINAL, *self.ends.values()):
                    advance(layer, index, self.held_out, self.states, stream)
        return ConvertedLayer(weights={}, spectra={})

    def _profile(self, layer: nn.Module, index: int) -> LayerProfile:
        """What calibration shows about the original layer; nothing of one that is converted already."""
        if self.known is not None:
            return self.known(index)
        if not self.is_original:
            return LayerProfile()
        given = (layer, index, self.calibration, self.states, CALIBRATION, self.methods)
        return measure_layer(*given, total=self.total, moments=False)

    def _factorised(
        self, source: nn.Module, partial: MLAAttention, stats: LayerStats, index: int
    ) -> tuple[MLAAttention, dict[str, Spectrum]]:
        """The layer's attention with its keys and values factorised, if they are to be, and their spectra."""
        if not self.factorises:
            return partial, {}
        spec = self.spec(index)
        whole, warned = self.whole(partial, spec), index if self.warn else None
        factors = self.factors(whole, stats, spec, by_importance=spec.bits is not None, layer=warned)
        spectra = {k: thinned(f.spectrum) for k, f in factors.items() if f.spectrum is not None}
        if spec.bits is not None:
            factors = {name: in_steps(factor, spec.bits) for name, factor in factors.items()}
            if not spec.at_read:
                whole = keys_in_steps(whole, stats.pooled(), head_dim=self.sizes.head_dim)
        return converted_layer(source, factored_weights(whole, factors), spec), spectra

    @torch.no_grad()
    def measured(self) -> Measured:
        """After the last layer: divergence from the original on held-out answers, in nats a token."""
        norm, head = end_modules(self.model)
        last, count = len(decoder_layers(self.model)), self.held_out_total
        sums = SharedSums(count)
        with resident((norm, head), self.device):
            for number, chat in enumerate(self.held_out):

                def log_probs(stream: str, key: int = number, chat: Chat = chat) -> torch.Tensor:
                    hidden = self.states[stream, last, key].to(self.device)
                    return logits_of(self.model, answer_states(chat, hidden, norm)).float().log_softmax(-1)

                expected = log_probs(ORIGINAL)
                found = [kl_sum(log_probs(stream), expected) for stream in self.ends.values()]
                numbers = torch.tensor([*found, len(expected)], dtype=torch.float64, device=self.device)
                row = torch.zeros(count, len(numbers), dtype=torch.float64, device=self.device)
                row[chat.number] = numbers
                sums.add(chat.number, {"all": numbers, "by chat": row})
        whole = sums.over_processes()
        *totals, answers = whole["all"].tolist()
        *columns, tokens = whole["by chat"].T.tolist()
        return Measured(
            kl={name: as_kl(total / answers) for name, total in zip(self.ends, totals, strict=True)},
            by_chat=dict(zip(self.ends, columns, strict=True)),
            tokens=[int(each) for each in tokens],
        )
