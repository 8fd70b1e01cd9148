"""Converted models: a subclass of each family's transformers class with latent attention inside."""

import functools
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from mha2mla_vlm.attention import MLAAttention
from mha2mla_vlm.cache import LatentCache, hold_latents, track_modality
from mha2mla_vlm.config import SHARED, AttentionSizes, MLAConfig
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.families import FAMILIES, get_family
from mha2mla_vlm.families.base import Family
from mha2mla_vlm.quantized_cache import quantized_cache

CACHES = ("dynamic", "offloaded", "static", "offloaded_static", "quantized")
REMOTE_MODULE = "modeling_mha2mla"
FINDINGS = "conversion.json"
_REMOTE_CODE = '''"""For trust_remote_code=True; the code itself is in the package mha2mla-vlm."""

try:
    from mha2mla_vlm.modeling import {config}, {model}
except ImportError as error:
    raise ImportError("this checkpoint needs the package mha2mla-vlm: pip install mha2mla-vlm") from error

__all__ = ["{config}", "{model}"]
'''


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The language model's layers, of an original or a converted model."""
    return model.model.language_model.layers


def layer_prefixes(model: PreTrainedModel) -> list[str]:
    """What the names of each decoder layer's parameters begin with."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] + "." for layer in decoder_layers(model)]


def write_findings(findings: dict[str, Any], folder: Path) -> None:
    """Write what a conversion found as `conversion.json`."""
    (folder / FINDINGS).write_text(json.dumps(findings) + "\n", encoding="utf-8")


if TYPE_CHECKING:  # a mixin to a PreTrainedModel
    from transformers import PreTrainedModel as _Model
else:
    _Model = object


class MLAMixin(_Model):
    """What a converted model adds to its family's class, whichever that is.

    `findings` are what its conversion found, where it was just made; `save_pretrained` writes them.
    """

    findings: dict[str, Any] | None = None

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.mla is None:
            raise InputError("the config has no `mla`; make one by converting a model")
        self.mla_config = MLAConfig.from_dict(config.mla)
        self.mla_config.check(AttentionSizes.of(config))
        self.family = get_family(config.model_type)
        self.visual_token_ids = self.family.visual_token_ids(config)
        config.auto_map = {
            "AutoConfig": f"{REMOTE_MODULE}.{type(config).__name__}",
            "AutoModelForImageTextToText": f"{REMOTE_MODULE}.{type(self).__name__}",
            "AutoModelForMultimodalLM": f"{REMOTE_MODULE}.{type(self).__name__}",
        }
        for layer in decoder_layers(self):
            rope_dim, rank = self.mla_config.layer(layer.self_attn.layer_idx)
            layer.self_attn = MLAAttention(
                layer.self_attn,
                rope_dim=rope_dim,
                rank=rank,
                modalities=self.mla_config.modalities,
                kv_bias=self.mla_config.kv_bias,
            )

    def _with_modality(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `forward`, plus the modality of all tokens, found once for all layers."""
        cache: Cache | None = inputs.get("past_key_values")
        if inputs.get("use_cache") is None:
            inputs["use_cache"] = self.config.get_text_config(decoder=True).use_cache and not self.training
        if inputs["use_cache"] and cache is None:
            cache = inputs["past_key_values"] = LatentCache()
        if isinstance(cache, StaticCache):
            hold_latents(cache)
        if self.mla_config.modalities != SHARED:
            names = ("input_ids", "inputs_embeds", "mm_token_type_ids")
            visual = self._visual_mask(*(inputs.get(name) for name in names))
            inputs["token_modality"] = track_modality(cache, visual)
        return inputs

    def _visual_mask(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        mm_token_type_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Which of the new tokens are visual, `[B, T]`."""
        if input_ids is not None:
            return torch.stack([input_ids == token for token in self.visual_token_ids]).any(0)
        if inputs_embeds is not None and mm_token_type_ids is not None:
            visual = mm_token_type_ids[:, -inputs_embeds.shape[1] :] > 0
            if self.family.marked:
                visual = visual | visual.roll(1, dims=1) | visual.roll(-1, dims=1)
            return visual
        raise InputError(
            "inputs_embeds alone do not tell visual from text tokens; give mm_token_type_ids [B, T] too"
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Make a `LatentCache` the default of `generate`; any other that is asked for works too."""
        wanted = generation_config.cache_implementation
        given = model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False
        if not given and wanted in (None, "dynamic"):
            model_kwargs["past_key_values"] = LatentCache()
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()
            return None
        config = dict(generation_config.cache_config or {})
        if not given and wanted == "quantized" and config.get("backend", "latent") == "latent":
            model_kwargs["past_key_values"] = quantized_cache(**config)
            return None
        if wanted is not None and wanted not in CACHES:
            raise InputError(f"unknown cache_implementation {wanted!r}; use one of {', '.join(CACHES)}")
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _get_static_cache_init_shape(self) -> None:
        """None: a static cache takes the shapes of latents from the first of them."""

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As transformers does, plus the module that loads the folder with `trust_remote_code=True`."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.save_remote_code(save_directory)
        if self.findings is not None:
            write_findings(self.findings, Path(save_directory))
        # weights under the names of the modules, not of the family's checkpoints before transformers 5
        super().save_pretrained(save_directory, **{"save_original_format": False, **kwargs})

    def save_remote_code(self, folder: str | Path) -> None:
        """Write the module that `auto_map` names."""
        code = _REMOTE_CODE.format(config=type(self.config).__name__, model=type(self).__name__)
        Path(folder, f"{REMOTE_MODULE}.py").write_text(code, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers does, but a missing or an extra key is an error: nothing is made up or dropped."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = {name: sorted(map(str, info.get(name, ()))) for name in ("missing_keys", "unexpected_keys")}
        if any(wrong.values()):
            listed = "; ".join(f"{k.replace('_', ' ')}: {', '.join(v[:5])}" for k, v in wrong.items() if v)
            raise InputError(f"the weights do not match the config ({listed}); convert the model again")
        return (model, info) if output_loading_info else model

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: `save_pretrained` writes the module that the auto classes need."""


class MLAConfigMixin:
    """The config side of `MLAMixin`."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do, as in `MLAMixin`."""


@functools.cache
def mla_classes(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Config and model class of a family's converted models, registered with the auto classes."""
    family = get_family(model_type)
    config_name, model_name = class_names(family)
    base_config = getattr(transformers, family.config_class)
    base_model = getattr(transformers, family.model_class)
    config_body = {
        "__module__": __name__,
        "__annotations__": {"mla": dict[str, Any] | None},
        "__doc__": f"Config of a converted {family.config_class.removesuffix('Config')} model.",
        "model_type": family.mla_model_type,
        "mla": None,
    }
    config_class = type(config_name, (MLAConfigMixin, base_config), config_body)
    signature = inspect.signature(base_model.forward)
    parameters = tuple(signature.parameters)[1:]

    @functools.wraps(base_model.forward)  # keeps the signature, which generate and trainers read
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = self._with_modality({**dict(zip(parameters, args, strict=False)), **kwargs})
        if "mm_token_type_ids" not in parameters:
            inputs.pop("mm_token_type_ids", None)
        return base_model.forward(self, **inputs)

    if "mm_token_type_ids" not in parameters:  # taken by all converted models, beside inputs_embeds
        *named, rest = signature.parameters.values()
        types = inspect.Parameter("mm_token_type_ids", inspect.Parameter.KEYWORD_ONLY, default=None)
        wrapped: Any = forward
        wrapped.__signature__ = signature.replace(parameters=[*named, types, rest])

    model_body = {
        "__module__": __name__,
        "forward": forward,
        "__doc__": f"`{family.model_class}` with latent attention.",
        "config_class": config_class,
    }
    model_class = type(model_name, (MLAMixin, base_model), model_body)
    AutoConfig.register(family.mla_model_type, config_class, exist_ok=True)
    AutoModelForImageTextToText.register(config_class, model_class, exist_ok=True)
    AutoModelForMultimodalLM.register(config_class, model_class, exist_ok=True)
    # by these names `transformers serve` knows how to load a model, and that it takes pictures
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault(family.mla_model_type, model_name)
    AutoProcessor.register(config_class, getattr(transformers, family.processor_class), exist_ok=True)
    return config_class, model_class


def class_names(family: Family) -> tuple[str, str]:
    """Names of the config and model class of a family's converted models."""
    suffix = "ForConditionalGeneration"
    return (
        family.config_class.removesuffix("Config") + "MLAConfig",
        family.model_class.removesuffix(suffix) + "MLA" + suffix,
    )


def register() -> None:
    """Make the auto classes of transformers know the converted models of all families."""
    for model_type in FAMILIES:
        mla_classes(model_type)


def __getattr__(name: str) -> Any:
    for model_type, family in FAMILIES.items():
        names = class_names(family)
        if name in names:
            return mla_classes(model_type)[names.index(name)]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
