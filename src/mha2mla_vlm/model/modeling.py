"""Converted models: a subclass of each family's transformers class with latent attention inside."""

import functools
import inspect
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    QuantizedCache,
)

from mha2mla_vlm.config import SHARED, AttentionSizes, MLAConfig
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.attention import MLAAttention
from mha2mla_vlm.model.cache.latent import LatentCache, hold_latents, track_modality
from mha2mla_vlm.model.cache.quantized import quantized_cache
from mha2mla_vlm.model.carried import write_code
from mha2mla_vlm.model.families import FAMILIES, get_family
from mha2mla_vlm.model.families.base import Family
from mha2mla_vlm.model.modality import TokenModality
from mha2mla_vlm.model.positions import RecordingRotary, TokenPositions
from mha2mla_vlm.model.soundness import check_config, check_pairs, loading_errors
from mha2mla_vlm.utils.compat import (
    CACHE,
    GenerationCompat,
    is_loaded,
    pop_cache,
    register_multimodal,
    without_attention_plan,
)

REMOTE_MODULE = "modeling_mha2mla"
FINDINGS = "conversion.json"
TOKEN_TYPES = "mm_token_type_ids"
VISUAL_INPUTS = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")


def text_model(model: PreTrainedModel) -> Any:
    """The language model without head, of an original or a converted model, whatever its family calls it."""
    return model.model.get_decoder()


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The language model's layers, of an original or a converted model."""
    return text_model(model).layers


def attention_of(layer: Any) -> Any:
    """The attention of a decoder layer, None where it has another kind of mixer."""
    return getattr(layer, "self_attn", None)


def latent_attentions(layers: Iterable[Any]) -> list[MLAAttention]:
    """The attention of those decoder layers that are converted."""
    found = (attention_of(layer) for layer in layers)
    return [attention for attention in found if isinstance(attention, MLAAttention)]


def layer_prefixes(model: PreTrainedModel) -> list[str]:
    """What the names of each decoder layer's parameters begin with."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] + "." for layer in decoder_layers(model)]


def write_findings(findings: dict[str, Any], folder: Path) -> None:
    """Write what a conversion found as `conversion.json`."""
    (folder / FINDINGS).write_text(json.dumps(findings) + "\n", encoding="utf-8")


if TYPE_CHECKING:  # mixins to a PreTrainedModel
    from transformers import PreTrainedModel as _Model
else:
    _Model = object


class MLACheckpoint(_Model):
    """What converted models with and without head share: how they are made, loaded and saved.

    `findings` are what its conversion found, where it was just made; `save_pretrained` writes them.
    """

    findings: dict[str, Any] | None = None

    def _prepare_config(self, config: Any) -> None:
        """Check `mla`, and name the classes that load the folder with `trust_remote_code=True`."""
        if config.mla is None:
            raise InputError("the config has no `mla`; make one by converting a model")
        self.mla_config = MLAConfig.from_dict(config.mla)
        self.mla_config.check(AttentionSizes.of(config))
        self.family = get_family(config.model_type)
        self.visual_token_ids = self.family.visual_token_ids(config)
        names = class_names(self.family)
        autos = {"AutoConfig": names.config, "AutoModel": names.inner}
        autos |= dict.fromkeys(("AutoModelForImageTextToText", "AutoModelForMultimodalLM"), names.model)
        config.auto_map = {auto: f"{REMOTE_MODULE}.{name}" for auto, name in autos.items()}

    def initialize_weights(self) -> None:
        """As transformers does, and the buffers of attention that no checkpoint gave."""
        super().initialize_weights()
        for attention in latent_attentions(self.get_decoder().layers):
            attention.reset_buffers(keep=is_loaded)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As transformers does, plus the code that loads the folder with `trust_remote_code=True`."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.save_remote_code(save_directory)
        if self.findings is not None:
            write_findings(self.findings, Path(save_directory))
        # weights under the names of the modules, not of the family's checkpoints before transformers 5
        super().save_pretrained(save_directory, **{"save_original_format": False, **kwargs})

    def save_remote_code(self, folder: str | Path) -> None:
        """Write the module that `auto_map` names, and those that it needs where this package is not."""
        write_code(Path(folder), REMOTE_MODULE, self.family.model_type, class_names(self.family))

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers does, but a missing or an extra key is an error: nothing is made up or dropped.

        A config is checked before it is built on, where it is given, as the auto classes do.
        """
        if isinstance(config := kwargs.get("config"), PreTrainedConfig):
            check_config(config)
        given = kwargs | {"ignore_mismatched_sizes": True}  # here they are refused, by name, unless asked for
        model, info = super().from_pretrained(*args, output_loading_info=True, **given)
        if kwargs.get("ignore_mismatched_sizes"):
            info["mismatched_keys"] = ()
        if found := loading_errors(info):
            raise InputError(f"the weights do not match the config: {found}; convert the model again")
        for attention in latent_attentions(model.get_decoder().layers):
            check_pairs(attention.rope_pairs, attention.rotary_dim, attention.layer_idx, attention.at_read)
        return (model, info) if output_loading_info else model

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: `save_pretrained` writes the code that the auto classes need."""


class MLAInnerMixin(MLACheckpoint):
    """What a converted model without head adds to its family's class: latent attention, and the modality of
    tokens, which is found here so that all that calls the model without its head works too.
    """

    _keys_to_ignore_on_load_unexpected = ("lm_head.weight",)  # of a checkpoint with head

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._prepare_config(config)
        layers = self.get_decoder().layers
        for index, layer in enumerate(layers):
            spec = self.mla_config.layer(index)
            if spec is not None:
                layer.self_attn = MLAAttention(layer.self_attn, spec)
        self.reads_positions = any(attention.at_read for attention in latent_attentions(layers))
        if self.reads_positions:
            self.get_decoder().rotary_emb = RecordingRotary(self.get_decoder().rotary_emb)
        without_attention_plan(self.get_decoder())
        self.post_init()  # once more, for what it gathers from the parts

    def with_modality(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `forward`, plus the modality and positions of all tokens, for all layers."""
        if inputs.get("return_shared_kv_states"):
            raise InputError(
                "Gemma 4's drafters read keys and values, and a converted model has latents; give another "
                "assistant_model"
            )
        cache = pop_cache(inputs)
        if inputs.get("use_cache") is None:
            inputs["use_cache"] = self.config.get_text_config(decoder=True).use_cache and not self.training
        if inputs["use_cache"] and cache is None:
            cache = LatentCache()
        if cache is not None:
            self.hold(cache)
        if self.mla_config.modalities != SHARED:
            inputs["token_modality"] = track_modality(cache, self._modality(inputs, cache))
        if self.reads_positions:
            inputs["token_positions"] = TokenPositions(self.get_decoder().rotary_emb)
        return inputs | {CACHE: cache}

    def hold(self, cache: Cache) -> None:
        """Make an empty cache one of latents, in the layers that have them."""
        converted = [isinstance(attention_of(layer), MLAAttention) for layer in self.get_decoder().layers]
        hold_latents(cache, converted, self.config.get_text_config(decoder=True))

    def _modality(self, inputs: dict[str, Any], cache: Cache | None) -> TokenModality | torch.Tensor:
        """The modality of the new tokens, or their mask `[B, T]`.

        One token after others is text if nothing visual comes with it: looking would wait for the device.
        """
        ids = inputs.get("input_ids")
        no_visuals = all(inputs.get(name) is None for name in VISUAL_INPUTS)
        later = cache is not None and cache.is_initialized
        if later and no_visuals and ids is not None and ids.shape[1] == 1:
            return TokenModality.of_text(len(ids), 1, ids.device)
        if ids is not None:
            return torch.stack([ids == token for token in self.visual_token_ids]).any(0)
        embeds, types = inputs.get("inputs_embeds"), inputs.get(TOKEN_TYPES)
        types = inputs.get(self.family.token_types) if types is None else types
        if embeds is None or (types is None and no_visuals):
            raise InputError(
                "inputs_embeds do not say which tokens are visual; give mm_token_type_ids [B, T] too"
            )
        # what is not filled in yet, and the marks around it, has the embeddings of its ids
        table = self.get_input_embeddings()
        known = [token for token in self.visual_token_ids if token < table.num_embeddings]  # not all defaults
        marks = table(torch.tensor(known, device=embeds.device))
        visual = torch.stack([(embeds == mark).all(-1) for mark in marks]).any(0)
        return visual if types is None else visual | (types[:, -embeds.shape[1] :] > 0)


class MLAMixin(GenerationCompat, MLACheckpoint):
    """What a converted model adds to its family's class with head."""

    model: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        checkpointing = getattr(config, "gradient_checkpointing", False)  # taken off it once it is heeded
        super().__init__(config, *args, **kwargs)
        self._prepare_config(config)
        del self.model  # before another takes its memory
        self.model = mla_inner_class(self.family)(config)
        if checkpointing:
            self.config.gradient_checkpointing = True
        self.post_init()

    def cache_for_generation(self, implementation: str | None, options: dict[str, Any]) -> Cache | None:
        """A `LatentCache` by default and a quantised one of ours unless another `backend` is asked for; all
        others are transformers', made latent when they are filled.
        """
        if implementation not in (None, "dynamic", "quantized"):
            return None
        if implementation != "quantized" or options.get("backend", "latent") == "latent":
            cache = quantized_cache(**options) if implementation == "quantized" else LatentCache()
            self.model.hold(cache)  # masks are made of it before it is filled
            return cache
        text = self.config.get_text_config(decoder=True)
        if left := AttentionSizes.of_text(text).left:
            raise InputError(
                f"backend {options['backend']!r} holds keys and values of all layers, but layer {left[0]} is "
                f"{text.layer_types[left[0]]}; leave the backend out, for 8, 4 or 2 bits of latents"
            )
        return QuantizedCache(**{"config": text, "q_group_size": self._quantization_group()} | options)

    def _quantization_group(self) -> int:
        """Of transformers' quantised caches: 64, their default, or what divides latents and rotated keys."""
        sizes = AttentionSizes.of(self.config)
        own = (sizes.kv_heads * sizes.head_dim,) * 2  # keys and values of a layer left as it was
        widths = [spec.widths(sizes) if spec else own for spec in self.mla_config.layers(sizes)]
        # where no rotated keys are cached, halves of the latent are
        return math.gcd(64, *(n for a, b in widths for n in ((a, b) if b else (a // 2, a - a // 2))))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: transformers' continuous batching pages keys and values, which converted models lack."""
        raise InputError(
            "continuous batching (generate_batch, cache_implementation='paged') pages keys and values, and a "
            "converted model has latents; use generate, or `vllm serve` for many users"
        )


class MLAConfigMixin:
    """The config side of `MLAMixin`."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do, as in `MLAMixin`."""


class ClassNames(NamedTuple):
    """Names of the classes of a family's converted models."""

    config: str
    inner: str
    model: str


def class_names(family: Family) -> ClassNames:
    """Names of the classes of a family's converted models."""
    suffix = "ForConditionalGeneration"
    stem = family.model_class.removesuffix(suffix) + "MLA"
    return ClassNames(
        config=family.config_class.removesuffix("Config") + "MLAConfig",
        inner=stem + "Model",
        model=stem + suffix,
    )


@functools.cache
def mla_config_class(family: Family) -> type[PreTrainedConfig]:
    """Config class of a family's converted models."""
    body = {
        "__module__": __name__,
        "__annotations__": {"mla": dict[str, Any] | None},
        "__doc__": f"Config of a converted {family.config_class.removesuffix('Config')} model.",
        "model_type": family.mla_model_type,
        "mla": None,
    }
    base = getattr(transformers, family.config_class)
    return type(class_names(family).config, (MLAConfigMixin, base), body)


@functools.cache
def mla_inner_class(family: Family) -> type[PreTrainedModel]:
    """Class of a family's converted models without head."""
    base = getattr(transformers, family.inner_class)
    parameters = tuple(inspect.signature(base.forward).parameters)[1:]

    @functools.wraps(base.forward)  # keeps the signature, which trainers read
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = self.with_modality({**dict(zip(parameters[: len(args)], args, strict=True)), **kwargs})
        return base.forward(self, **_known_to(parameters, inputs))

    body = {
        "__module__": __name__,
        "forward": forward,
        "__doc__": f"`{family.inner_class}` with latent attention.",
        "config_class": mla_config_class(family),
    }
    return type(class_names(family).inner, (MLAInnerMixin, base), body)


def _known_to(parameters: tuple[str, ...], inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs without the types of tokens where the family's class does not take them."""
    return {k: v for k, v in inputs.items() if k != TOKEN_TYPES or k in parameters}


@functools.cache
def mla_model_class(family: Family) -> type[PreTrainedModel]:
    """Class of a family's converted models."""
    base = getattr(transformers, family.model_class)
    body = {
        "__module__": __name__,
        "__doc__": f"`{family.model_class}` with latent attention.",
        "config_class": mla_config_class(family),
    }
    signature = inspect.signature(base.forward)
    if TOKEN_TYPES not in signature.parameters:  # taken by all converted models, beside inputs_embeds

        @functools.wraps(base.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return base.forward(self, *args, **kwargs)

        *named, rest = signature.parameters.values()
        types = inspect.Parameter(TOKEN_TYPES, inspect.Parameter.KEYWORD_ONLY, default=None)
        wrapped: Any = forward
        wrapped.__signature__ = signature.replace(parameters=[*named, types, rest])
        body["forward"] = forward
    return type(class_names(family).model, (MLAMixin, base, GenerationMixin), body)


def family_classes(
    model_type: str,
) -> tuple[type[PreTrainedConfig], type[PreTrainedModel], type[PreTrainedModel]]:
    """Config and model classes, without and with head, of a family's converted models."""
    family = get_family(model_type)
    return mla_config_class(family), mla_inner_class(family), mla_model_class(family)


@functools.cache
def mla_classes(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Config and model class of a family's converted models, registered with the auto classes."""
    family = get_family(model_type)
    config_class, inner_class, model_class = family_classes(model_type)
    AutoConfig.register(family.mla_model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, inner_class, exist_ok=True)
    AutoModelForImageTextToText.register(config_class, model_class, exist_ok=True)
    AutoModelForMultimodalLM.register(config_class, model_class, exist_ok=True)
    register_multimodal(family.mla_model_type, model_class.__name__)
    AutoProcessor.register(config_class, getattr(transformers, family.processor_class), exist_ok=True)
    return config_class, model_class


def register() -> None:
    """Make the auto classes of transformers know the converted models of all families."""
    for model_type in FAMILIES:
        mla_classes(model_type)


def __getattr__(name: str) -> Any:
    makers = {"config": mla_config_class, "inner": mla_inner_class, "model": mla_model_class}
    for model_type, family in FAMILIES.items():
        for part, known in class_names(family)._asdict().items():
            if name == known:
                mla_classes(model_type)  # who asks for a class by name wants the auto classes to know it
                return makers[part](family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
