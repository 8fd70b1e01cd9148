"""The conversion of a model's attention, one layer after the other: what is in memory is one layer at a time.

Chats are taken along in streams of hidden states: those that calibrate through the original layers
(`calibration`) and, for methods that factorise what partial RoPE leaves, through the layers with
partial RoPE (`calibration partial`); those that are held out through the `original`, the `partial` and
the `converted` layers, whose ends give the loss.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import BatchFeature, PreTrainedModel

from mha2mla_vlm.calibration.activations import (
    Chat,
    MemoryStates,
    States,
    advance,
    answer_states,
    attending,
    begin,
)
from mha2mla_vlm.calibration.layer_profile import LayerProfile, measure_layer, measure_moments
from mha2mla_vlm.calibration.statistics import LayerStats
from mha2mla_vlm.config import BLOCKS, OUTPUT_WEIGHTED, AttentionSizes, ConversionConfig, LayerSpec, MLAConfig
from mha2mla_vlm.conversion.profile import CALIBRATION
from mha2mla_vlm.conversion.weights import (
    converted_layer,
    factored_weights,
    layer_factors,
    partial_layer,
    table_scale,
)
from mha2mla_vlm.evaluation.answers import as_kl, kl_sum
from mha2mla_vlm.model.attention import MLAAttention
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.model.offload import end_modules, resident
from mha2mla_vlm.utils.distributed import own_share, sum_over_processes
from mha2mla_vlm.utils.progress import Phases

CALIBRATION_PARTIAL = "calibration partial"
ORIGINAL, PARTIAL, CONVERTED = "original", "partial", "converted"
MOMENTLESS = ("none", "weight-svd", *BLOCKS)


Spectrum = list[tuple[int, float]]  # number of a direction, what it carries of what the first does


@dataclass(frozen=True, kw_only=True)
class ConvertedLayer:
    """Parameters of a layer's `MLAAttention` but for `o_proj`, which stays, and spectra by modality."""

    weights: dict[str, torch.Tensor]
    spectra: dict[str, Spectrum]


def thinned(spectrum: torch.Tensor, points: int = 48) -> Spectrum:
    """A spectrum at some of its places, more of them at its begin."""
    places = torch.logspace(0, math.log10(len(spectrum)), points).round().long().unique()
    values = (spectrum / spectrum[0]).clamp_min(0.0)
    return [(int(place), round(float(values[place - 1]), 9)) for place in places]


class LayerwiseConversion:
    """Converts the layers of `model`, which may lie on disk, as `mla` says; call `layer` for each in turn.

    `states` holds the streams, by default in memory. `known` tells what calibration found of a layer,
    where that was measured before; `warn` of modalities with too few tokens in calibration.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: ConversionConfig,
        mla: MLAConfig,
        *,
        device: torch.device,
        phases: Phases,
        states: States | None = None,
        known: Callable[[int], LayerProfile] | None = None,
        warn: bool = True,
    ) -> None:
        self.model, self.config, self.mla, self.device = model, config, mla, device
        self.phases, self.warn = phases, warn
        self.states: States = MemoryStates() if states is None else states
        self.known = known
        self.sizes = AttentionSizes.of(model.config)
        self.is_original = getattr(model.config, "mla", None) is None
        self.factorises = config.factorization != "none"
        self.ends = {"partial_rope": PARTIAL} if self.is_original else {}  # streams that losses are read from
        self.ends |= {"factorization": CONVERTED} if self.factorises else {}
        self.after_rope = config.factorization not in (*MOMENTLESS, *OUTPUT_WEIGHTED)
        self.calibration: list[Chat] = []
        self.held_out: list[Chat] = []
        self.total = 0

    def begin(
        self, calibration: Sequence[BatchFeature], held_out: Sequence[BatchFeature], *, again: bool = False
    ) -> None:
        """Bring this process's share of the chats before the first layer; or, `again`, only what layers are
        given besides states.
        """
        self.total = len(calibration)
        visual = get_family(self.model.config.model_type).visual_token_ids(self.model.config)
        wanted = [CALIBRATION] if self.is_original and self.known is None else []
        wanted += [CALIBRATION_PARTIAL] if self.after_rope else []
        ends = [ORIGINAL, *self.ends.values()]

        def chats(batches: Sequence[BatchFeature], streams: list[str]) -> list[Chat]:
            started = [] if again else streams
            return begin(self.model, own_share(batches), visual, self.device, self.states, started)

        with self.phases.phase("vision and embeddings"):
            self.calibration = chats(calibration, wanted) if wanted else []
            self.held_out = chats(held_out, ends)

    @torch.no_grad()
    def layer(self, index: int) -> ConvertedLayer:
        """Convert a layer.

        Raises `InputError` naming the layer if calibration gives numbers that are not finite.
        """
        layer = decoder_layers(self.model)[index]
        with resident(layer.modules(), self.device):
            with self.phases.phase("calibration"):
                profile = self._profile(layer, index)
            with self.phases.phase("partial RoPE"):
                partial = self._partial(layer.self_attn, profile, index)
            stats = profile.stats
            if self.after_rope:
                with self.phases.phase("calibration"), attending(layer, partial):
                    stats = measure_moments(layer, index, self.calibration, self.states, CALIBRATION_PARTIAL)
                LayerProfile(stats=stats).check(index)
            with self.phases.phase("factorisation"):
                converted, spectra = self._factorised(layer.self_attn, partial, stats, index)
            with self.phases.phase("held-out loss"):
                attention = {ORIGINAL: layer.self_attn, PARTIAL: partial, CONVERTED: converted}
                for stream in (ORIGINAL, *self.ends.values()):
                    with attending(layer, attention[stream]):
                        advance(layer, index, self.held_out, self.states, stream)
        weights = {k: v for k, v in converted.state_dict().items() if not k.startswith("o_proj.")}
        return ConvertedLayer(weights=weights, spectra=spectra)

    def _profile(self, layer: nn.Module, index: int) -> LayerProfile:
        """What calibration tells about the original layer; nothing is asked of one that is none any more."""
        if self.known is not None:
            return self.known(index)
        if not self.is_original:
            return LayerProfile()
        options: dict[str, Any] = {"total": self.total, "moments": False}
        given = (layer, index, self.calibration, self.states, CALIBRATION, self.config)
        return measure_layer(*given, **options).check(index)

    def _partial(self, source: Any, profile: LayerProfile, index: int) -> MLAAttention:
        """The layer's attention with partial RoPE alone."""
        if not self.is_original:
            return source
        spec = cast(LayerSpec, self.mla.layer(index))
        selection = profile.selection(spec.rope_dim, self.sizes, self.config)
        return partial_layer(source, selection, self.mla, index, table_scale(self.model))

    def _factorised(
        self, source: nn.Module, partial: MLAAttention, stats: LayerStats, index: int
    ) -> tuple[MLAAttention, dict[str, Spectrum]]:
        """The layer's attention with its keys and values factorised, if they are to be, and their spectra."""
        if not self.factorises:
            return partial, {}
        whole = partial.state_dict()
        factors = layer_factors(whole, stats, self.mla, index, self.sizes.head_dim, warn=self.warn)
        spectra = {k: thinned(f.spectrum) for k, f in factors.items() if f.spectrum is not None}
        return converted_layer(source, factored_weights(whole, factors), self.mla, index), spectra

    @torch.no_grad()
    def kl(self) -> dict[str, float]:
        """After the last layer: mean divergence from the original on held-out answers, in nats a token."""
        norm, head = end_modules(self.model)
        last = len(decoder_layers(self.model))
        sums = torch.zeros(len(self.ends) + 1, dtype=torch.float64, device=self.device)
        with resident((norm, head), self.device):
            for number, chat in enumerate(self.held_out):

                def log_probs(stream: str, key: int = number, chat: Chat = chat) -> torch.Tensor:
                    hidden = self.states[stream, last, key].to(self.device)
                    return head(answer_states(chat, hidden, norm)).float().log_softmax(-1)

                expected = log_probs(ORIGINAL)
                sums[-1] += len(expected)
                for position, stream in enumerate(self.ends.values()):
                    sums[position] += kl_sum(log_probs(stream), expected)
        sum_over_processes([sums])
        return {name: as_kl(float(total / sums[-1])) for name, total in zip(self.ends, sums, strict=False)}
