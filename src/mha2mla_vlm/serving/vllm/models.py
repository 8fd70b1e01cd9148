"""Converted models as vLLM's: a subclass of its own class of each family, with latent attention inside."""

import functools
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from mha2mla_vlm.config import AttentionSizes, MLAConfig
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.families import FAMILIES, get_family
from mha2mla_vlm.model.families.base import Family
from mha2mla_vlm.model.modeling import class_names
from mha2mla_vlm.serving.vllm.attention import LatentAttention, StepTokens
from mha2mla_vlm.serving.vllm.compat import PPMissingLayer, VllmConfig, stock_class

if TYPE_CHECKING:  # a mixin to one of vLLM's models
    from torch.nn import Module as _Model
else:
    _Model = object

_ATTENTION = re.compile(r"(?:language_model|text_model)\.(?:model\.)?layers\.(\d+)\.self_attn\.")
_PROJECTIONS = {"q_proj": "query_proj", "k_proj": "key_proj", "v_proj": "value_proj"}
_EXPERTS = re.compile(r"\.mlp\.experts\.(?:gate_up|down)_proj$")
_TOWER = re.compile(r"(vision_tower\.)(embeddings|encoder|pre_layrnorm|post_layernorm)\.")


class LatentMixin(_Model):
    """What a converted model adds to vLLM's class of its family, whichever that is."""

    requires_raw_input_tokens = True  # token ids beside embeddings: they show which are visual

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config: Any = vllm_config.model_config.hf_config
        self.mla, family = MLAConfig.from_dict(config.mla), get_family(config.model_type)
        self.normed = False  # queries and keys
        if family.left_layers:
            raise InputError(
                f"{family.model_type} is not served by vLLM yet: pages hold latents only, not what layers "
                f"of {' and '.join(family.left_layers)} keep; use generate, or serve the original"
            )
        ids = family.visual_token_ids(config)
        axes = AttentionSizes.of(config).position_axes
        self.tokens = StepTokens(ids, axes, vllm_config.scheduler_config.max_num_batched_tokens)
        language: Any = self.get_language_model()
        for index, layer in enumerate(getattr(language, "model", language).layers):
            spec = self.mla.layer(index)
            if spec is not None and not isinstance(layer, PPMissingLayer):  # else another process has it
                held = axes if spec.at_read else 0  # positions, once for all layers of this process
                layer.self_attn = LatentAttention(layer.self_attn, spec, self.tokens, vllm_config, held)
                axes -= held
                self.normed |= layer.self_attn.normed

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the family's class does, once modality and positions of the new tokens are known."""
        self.tokens.note(input_ids, positions)
        return super().forward(input_ids, positions, *args, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Weights of a converted checkpoint."""
        return super().load_weights(self._renamed(weights))

    def _renamed(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights under the names that vLLM's classes have, without what `projections.Replaced` holds."""
        # transformers 5 names what is in a tower without its `vision_model`
        deep = any("vision_tower.vision_model." in name for name, _ in self.named_parameters())
        for name, value in weights:
            found = _ATTENTION.search(name)
            if found and self.mla.layer(int(found[1])) is not None:
                place, kind = name[: found.end()], name[found.end() :]
                old = kind.partition(".")[0]
                if old in ("k_proj", "v_proj") and not self.normed:
                    continue
                if old in _PROJECTIONS:  # vLLM would take it for a part of its `qkv_proj`
                    name = f"{place}{_PROJECTIONS[old]}{kind[len(old) :]}"
            if _EXPERTS.search(name):  # vLLM expects them as the original's files have them
                value = value.transpose(1, 2)
            yield (_TOWER.sub(r"\1vision_model.\2.", name) if deep else name), value


@functools.cache
def serving_class(family: Family) -> type[Any]:
    """vLLM's class of a family's converted models, with the processor of the original's."""
    name = class_names(family).model
    body = {"__module__": __name__, "__doc__": f"`{family.model_class}` with latent attention, in vLLM."}
    return type(name, (LatentMixin, stock_class(family.model_class)), body)


def __getattr__(name: str) -> Any:
    for family in FAMILIES.values():
        if name == class_names(family).model:
            return serving_class(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
