"""All that we use of transformers, accelerate and torch beyond what they document, and names that changed.

Each use says why, and in which versions it was seen: transformers 5.16 to 5.24, accelerate 1.10 to 1.15,
torch 2.9 to 2.15 where nothing else is said. `serving/vllm/compat.py` does the same for vLLM.
`model/cache/latent.py` subclasses `DynamicLayer` and `StaticLayer`, whose `keys`, `values` and
`is_initialized` subclasses share.
"""

import contextlib
import functools
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import Cache, DynamicCache, LlamaForCausalLM, PreTrainedModel, StaticCache
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils.output_capturing import _active_collector

from mha2mla_vlm.config import is_proportional, rope_parameters

if TYPE_CHECKING:  # a mixin to a GenerationMixin
    from transformers import GenerationMixin as _Generation
    from transformers import Trainer
else:
    _Generation = object

_NAMES = ("cache", "past_key_values")
# transformers 5.24 renamed the argument and the output; both names mean the same to converted models
CACHE = next(name for name in _NAMES if name in inspect.signature(LlamaForCausalLM.forward).parameters)

_aten = torch.ops.aten


def cache_argument(cache: Cache | None) -> dict[str, Any]:
    """A cache as the keyword argument of a model, a layer or `generate`."""
    return {CACHE: cache}


def pop_cache(arguments: dict[str, Any]) -> Cache | None:
    """Take the cache, under either name, out of keyword arguments."""
    found = [arguments.pop(name, None) for name in _NAMES]
    return next((cache for cache in found if cache is not None), None)


def cache_of(output: Any) -> Any:
    """The cache in what a model or `generate` returned."""
    return getattr(output, CACHE)


class GenerationCompat(_Generation):
    """Where `generate` makes a cache: a model says which by `cache_for_generation`."""

    def cache_for_generation(self, implementation: str | None, options: dict[str, Any]) -> Cache | None:
        """The cache for a `cache_implementation` and its `cache_config`; None for transformers' own."""
        raise NotImplementedError

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """There is no public place for a model's own cache (huggingface/transformers, GenerationMixin)."""
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            options = dict(generation_config.cache_config or {})
            cache = self.cache_for_generation(generation_config.cache_implementation, options)
            if cache is not None:
                model_kwargs[CACHE] = cache
                if generation_config.is_assistant:
                    cache.activate_past_recording()
                return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _get_static_cache_init_shape(self) -> None:
        """None: a static cache takes the shapes of latents from the first of them, not from the config."""


def replace_layers(cache: Cache, kinds: dict[type[Any], Any], replaced: Sequence[bool]) -> bool:
    """Give an empty cache layers of our own in the place of transformers' `kinds`, where they are to be
    `replaced`; whether it now has them.

    `layer_class_to_replicate` and `layers` are how caches are made of layers; there is no public way to ask
    for others once `generate` or a user made the cache.
    """
    made = []
    for layer, ours in zip(cache.layers, replaced, strict=False):
        if not ours:
            made.append(layer)
            continue
        kind = kinds.get(type(layer))
        if kind is None or layer.is_initialized:
            return False
        room = {"max_cache_len": layer.max_cache_len} if isinstance(cache, StaticCache) else {}
        made.append(kind(**room))
    replicated: Any = cache.layer_class_to_replicate
    if replicated is not None:
        if replicated not in kinds:
            return False
        cache.layer_class_to_replicate = kinds[replicated]
    cache.layers = made
    return True


def replicate(cache: DynamicCache, kind: Any) -> None:
    """Let a cache without layers make its layers of `kind` as they are needed."""
    cache.layers, cache.layer_class_to_replicate = [], kind


def add_layer(cache: Cache) -> None:
    """Let a cache that makes its layers as they are needed make the next one now."""
    cache.layers.append(cache.layer_class_to_replicate())


def make_layers(cache: Cache, replicated: Sequence[bool], config: Any) -> None:
    """Let such a cache make all its layers now: those of transformers, for a language model of this config,
    where they are not to be `replicated`.
    """
    kind: Any = cache.layer_class_to_replicate
    own = DynamicCache(config=config).layers
    cache.layers = [kind() if ours else layer for layer, ours in zip(own, replicated, strict=True)]
    cache.layer_class_to_replicate = None  # all are there


def static_room(layer: Any) -> int:
    """Tokens that a layer of a static cache has room for."""
    return layer.max_cache_len


def static_length(layer: Any) -> torch.Tensor:
    """Tokens in a layer of a static cache, where the layer counts them itself."""
    return layer.cumulative_length


def keep_address(tensor: torch.Tensor) -> None:
    """Mark a tensor as never replaced: CUDA graphs of `torch.compile` then do not copy it at each step."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)


def one_table(table: torch.Tensor, config: Any) -> torch.Tensor:
    """A rotary table as `[B, T, D]`, under a language model's config, of the dims that are rotated.

    transformers 5.16 hands Qwen2.5-VL's layers the time, height and width tables of multimodal RoPE apart,
    `[3, B, T, D]`, and merges their sections within its attention; later versions do it before. Tables of
    proportional RoPE (Gemma 4) are of all dims.
    """
    if table.ndim == 3:
        rope = rope_parameters(config)
        if not is_proportional(rope):
            return table
        halves = table.chunk(2, dim=-1)
        turned = int(rope.get("partial_rotary_factor", 1) * table.shape[-1]) // 2
        return torch.cat([half[..., :turned] for half in halves], dim=-1)
    sections = 2 * list(config.rope_parameters["mrope_section"])
    parts = table.split(sections, dim=-1)
    return torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=-1)


def takes_layer_type(rotary: Any) -> bool:
    """Whether a rotary embedding has tables for each type of layer, as Gemma's does."""
    return "layer_type" in inspect.signature(rotary.forward).parameters


def of_full_attention(rotary: Any) -> Any:
    """Such a rotary embedding as layers of full attention get it."""
    return functools.partial(rotary, layer_type="full_attention")


def rotary_scaling(rotary: Any) -> float:
    """What the tables of layers of full attention are multiplied by (longer-context variants of RoPE)."""
    own = getattr(rotary, "full_attention_attention_scaling", 1.0)
    return float(getattr(rotary, "attention_scaling", own))


class _Forgetful(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        """Keeps nothing."""


def unshared(module: nn.Module) -> dict[str, Any]:
    """The argument by which Gemma 4's layers, and their attention, want a place for keys and values that
    later layers may read, which none does in models that are converted.
    """
    name = "shared_kv_states"
    return {name: _Forgetful()} if name in inspect.signature(module.forward).parameters else {}


def attention_backend(config: Any) -> Any:
    """The attention function that a text config is set to. A model's own `eager_attention_forward` is not
    among those registered; Llama's is that of all supported families.
    """
    return ALL_ATTENTION_FUNCTIONS.get_interface(attention_name(config), eager_attention_forward)


def attention_name(config: Any) -> str:
    """Which attention implementation a config is set to; there is no public getter."""
    return config._attn_implementation


def set_attention_name(config: Any, name: str) -> None:
    """Set it of one config, unchecked; `set_attn_implementation` of a model checks, for all its parts."""
    config._attn_implementation = name


def records_attentions() -> bool:
    """Whether `output_attentions=True` is being answered."""
    collected = _active_collector.get()
    return collected is not None and "attentions" in collected


def record_attentions(weights: torch.Tensor | None) -> None:
    """Hand attention weights to `output_attentions=True`.

    transformers finds them by hooks on modules of the family's own attention class, which ours is not.
    """
    if weights is not None and records_attentions():
        _active_collector.get()["attentions"].append(weights)


def without_attention_plan(text_model: PreTrainedModel) -> None:
    """Take attention out of a language model's tensor-parallel plan, which names projections it lacks now.

    Every process then holds attention whole and splits the rest.
    """
    plan = text_model.tp_plan or {}
    text_model.tp_plan = {name: style for name, style in plan.items() if ".self_attn." not in name}


def is_loaded(tensor: torch.Tensor) -> bool:
    """Whether a tensor came from a checkpoint, so that initialisation must not touch it."""
    return getattr(tensor, "_is_hf_initialized", False)


def register_multimodal(model_type: str, class_name: str) -> None:
    """By these names `transformers serve` knows how to load a model, and that it takes images."""
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault(model_type, class_name)


def tied_names(model: Any) -> set[str]:
    """Names of parameters that are others' (tied embeddings)."""
    return set(getattr(model, "all_tied_weights_keys", ()))


def reshaped_names(model: Any) -> list[str]:
    """Names of the parameters that a class holds in another shape than its checkpoints do (experts).

    Where weights stay on disk, `from_pretrained` writes these anew to an `offload_folder`, which it asks for
    only once it has begun.
    """
    made = [x for x in get_model_conversion_mapping(model) if isinstance(x, WeightConverter)]
    patterns = [re.compile(pattern) for each in made for pattern in each.target_patterns]
    return [name for name, _ in model.named_parameters() if any(p.search(name) for p in patterns)]


def image_token_counts(processor: Any, sizes: list[tuple[int, int]]) -> list[int] | None:
    """Placeholders that images of these heights and widths take in one chat, without preparing their pixels.

    None where the processor cannot tell: SmolVLM's has no such method, LLaVA-OneVision's (which alone has
    a `vision_aspect_ratio`) counts each image as if it were alone in its chat, and Gemma 3's counts no crops.
    """
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    alone = len(sizes) > 1 and hasattr(processor, "vision_aspect_ratio")
    if count is None or alone or hasattr(processor, "full_image_sequence"):
        return None
    return count(image_sizes=sizes)["num_image_tokens"]


def with_image_text(processor: Any, text: str) -> str:
    """A chat's text with what Gemma's processors write in an image's place, which other processors only
    repeat: line breaks and marks, that tokens beside them may merge with. Gemma 4's then repeats it, too.
    """
    written = getattr(processor, "full_image_sequence", None)
    if written is None and hasattr(processor, "eoi_token"):
        written = processor.boi_token + processor.image_token + processor.eoi_token
    return text if written is None else text.replace(processor.image_token, written)


def enable_checkpointing(model: Any) -> None:
    """Compute activations again in the backward pass; transformers 5.23 renamed the method.

    Not re-entrant: re-entrant checkpointing finds no gradient where embeddings are frozen.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def prepare_inputs(trainer: "Trainer", inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs on the trainer's device, in DeepSpeed's dtype, for what is done before its own step."""
    return trainer._prepare_inputs(inputs)


@contextlib.contextmanager
def hook_at_rest(module: Any) -> Iterator[None]:
    """Within the context, accelerate's hook of an offloaded module neither reads nor drops its weights.

    accelerate has no public switch; the first call of the module undoes `align_module_device`.
    """
    module._hf_hook.offload = False
    try:
        yield
    finally:
        module._hf_hook.offload = True


def offloaded_value(module: Any, name: str) -> torch.Tensor:
    """A parameter of a module whose weights accelerate keeps on disk."""
    return module._hf_hook.weights_map[name]


def offloaded_shape(module: Any, name: str) -> tuple[int, ...] | None:
    """The shape of a parameter that accelerate keeps on disk, as its file says it; None if in no file."""
    kept = module._hf_hook.weights_map
    entry = kept.dataset.index.get(kept.prefix + name, {})
    if entry.get("safetensors_file") is None:
        return None
    with safe_open(entry["safetensors_file"], framework="pt") as file:
        return tuple(file.get_slice(entry.get("weight_name", kept.prefix + name)).get_shape())


def is_plain(linear: nn.Module) -> bool:
    """Whether a linear layer may be read beside its `forward`: its product is all that it does.

    Not so for subclasses (LoRA, bitsandbytes), hooks (offloading) and weights that are not numbers of their
    own (quantised tensor subclasses, meta). DTensors are: FSDP and tensor parallelism gather them.
    """
    if type(linear) is not nn.Linear or hasattr(linear, "_hf_hook"):
        return False
    if linear._forward_hooks or linear._forward_pre_hooks:
        return False
    return isinstance(linear.weight, DTensor) or is_plain_tensor(linear.weight)


def is_plain_tensor(x: torch.Tensor) -> bool:
    """Whether a tensor's storage holds its numbers as they are."""
    floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return x.dtype in floats and not x.is_meta and not is_traceable_wrapper_subclass(x)


def flash_with_mass(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention `[1, h, T, D]` and the log of its mass `[1, h, T]`, by PyTorch's fused kernels.

    `scaled_dot_product_attention` does not return the log-sum-exp that merging needs.
    """
    if queries.device.type == "cpu":
        attention = _aten._scaled_dot_product_flash_attention_for_cpu
        return attention(queries, keys, values, 0.0, causal, scale=scaling)
    if queries.dtype == torch.float32:
        attention = _aten._scaled_dot_product_efficient_attention
        output, lse, *_ = attention(queries, keys, values, None, True, 0.0, causal, scale=scaling)
        return output, lse[..., : queries.shape[2]]  # padded
    attention = _aten._scaled_dot_product_flash_attention
    output, lse, *_ = attention(queries, keys, values, 0.0, causal, False, scale=scaling)
    return output, lse
