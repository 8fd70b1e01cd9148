"""What every sweep of chats over a model's layers has in common."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedModel

from mha2mla_vlm.algorithms.factorization import factorization
from mha2mla_vlm.algorithms.factorization.low_rank import Factors
from mha2mla_vlm.algorithms.pair_selection import pair_selection
from mha2mla_vlm.calibration.activations import Chat, begin
from mha2mla_vlm.calibration.layer_profile import LayerProfile, Methods
from mha2mla_vlm.calibration.statistics import LayerStats
from mha2mla_vlm.config import AttentionSizes, LayerSpec, MLAConfig
from mha2mla_vlm.conversion.config import BY_CHANNEL, ConversionConfig
from mha2mla_vlm.conversion.weights import layer_factors, partial_layer, rotated_at_read, table_scale
from mha2mla_vlm.conversion.work import Work
from mha2mla_vlm.model.attention import MLAAttention
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.model.normed import is_normed
from mha2mla_vlm.utils.distributed import own_share
from mha2mla_vlm.utils.progress import Phases

CALIBRATION = "calibration"  # a stream through the original layers
Known = Callable[[int], LayerProfile]


def methods(config: ConversionConfig) -> Methods:
    """The methods that a configuration names; with `modes` what is measured serves each of them."""
    return Methods(
        pairs=pair_selection(config.rope_selection if config.drops_pairs else "high"),
        fold=config.fold and config.drops_pairs,
        factorization=factorization(config.factorization),
        at_read="read" in config.modes,
    )


def has_normed_keys(model: PreTrainedModel) -> bool:
    """Whether keys are normed in any layer that is converted."""
    growing = AttentionSizes.of(model.config).growing
    return any(is_normed(decoder_layers(model)[index].self_attn) for index in growing)


class Sweep:
    """A sweep over the layers of `model`, which may lie on disk, for a conversion as `config` and `mla` say.

    What it finds stays in `work`; `phases` show how far it is.
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
        self.methods = methods(config)
        self.by_mode = {mode: methods(config.of(mode)) for mode in config.modes}
        self.phases, self.work, self.states = phases, work, work.states
        self.sizes = AttentionSizes.of(model.config)

    def tried_bits(self, mode: str) -> list[str]:
        """How latents may be kept in layers of a mode."""
        possible = mode == "read" or not has_normed_keys(self.model)
        return [bits for bits in self.config.tried_bits if bits != BY_CHANNEL or possible]

    def chats(self, batches: Sequence[BatchFeature], streams: Sequence[str]) -> list[Chat]:
        """This process's share of chats, brought before the first layer, where they begin `streams`."""
        visual = get_family(self.model.config.model_type).visual_token_ids(self.model.config)
        own = own_share(len(batches))
        with self.phases.phase("vision and embeddings"):
            given = (self.model, batches[own.start : own.stop], visual, self.device, self.states, streams)
            return begin(*given, first=own.start)

    def spec(self, index: int) -> LayerSpec:
        """What a layer becomes."""
        spec = self.mla.layer(index)
        assert spec is not None, "a layer that is converted"
        return spec

    def stays(self, index: int) -> bool:
        """Whether a layer stays as the original has it."""
        return index in self.sizes.left

    def partial(self, source: Any, profile: LayerProfile, spec: LayerSpec) -> MLAAttention:
        """A layer's attention with partial RoPE only."""
        selection = profile.selection(spec.rope_dim, self.sizes, self.by_mode[spec.rotate_at])
        return partial_layer(source, selection, spec, table_scale(self.model))

    def factors(
        self, whole: dict[str, torch.Tensor], stats: LayerStats, spec: LayerSpec, **how: Any
    ) -> dict[str, Factors]:
        """Factors of a layer's keys and values, by modality; options go to `layer_factors`."""
        how |= {"head_dim": self.sizes.head_dim, "pair_stride": self.sizes.pair_stride}
        return layer_factors(whole, stats, spec, self.methods.factorization, **how)

    def whole(self, partial: MLAAttention, spec: LayerSpec) -> dict[str, torch.Tensor]:
        """Parameters of a layer after partial RoPE, as they are factorised."""
        weights = partial.new_weights()
        return rotated_at_read(weights) if spec.at_read else weights
