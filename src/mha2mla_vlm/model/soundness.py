"""What a model's config, and a converted one's pairs, must say before anything is computed by them."""

import math
from typing import Any

import torch
from torch import nn

from mha2mla_vlm.config import FULL, AttentionSizes, MLAConfig, rope_parameters
from mha2mla_vlm.errors import InputError, shown
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.families.base import Family

_LARGEST = 2**31
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_COUNTS = (  # of whichever towers have them
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_heads",
    "num_key_value_heads", "head_dim", "depth", "image_size", "patch_size", "num_channels",
)  # fmt: skip


def check_stored(values: dict[str, Any]) -> None:
    """Raise `InputError` for what a `config.json` says that no class of a config may be made of."""
    get_family(values.get("model_type"))
    for place in ("text_config", "vision_config"):
        part = values.get(place, {})
        if not isinstance(part, dict):
            raise InputError(f"{place} = {shown(part)}: give a mapping")
        _check_counts(place, part)
        _check_quantization(part)
    _check_counts("config", values)
    _check_quantization(values)


def check_config(config: Any) -> None:
    """Raise `InputError`, naming the key, for a config that no sound model of a supported family has."""
    family = get_family(config.model_type)
    text = config.get_text_config(decoder=True)
    _check_rope(text, family)
    sizes = AttentionSizes.of(config)
    if not _is_count(sizes.kv_heads) or sizes.heads % sizes.kv_heads:
        raise InputError(
            f"num_key_value_heads = {shown(sizes.kv_heads)}: give a number that divides num_attention_heads, "
            f"{sizes.heads}"
        )
    if not _is_count(sizes.head_dim) or sizes.head_dim % 2:
        raise InputError(f"head_dim = {shown(sizes.head_dim)}: give an even number above 0")
    if sizes.rotary_dim % 2 or not 0 < sizes.rotary_dim <= sizes.head_dim:
        raise InputError(
            f"partial_rotary_factor gives RoPE over {sizes.rotary_dim} of {sizes.head_dim} dims; give one "
            "for an even number above 0"
        )
    if not sizes.growing:
        raise InputError(f"layer_types has no {FULL}, so that there is no layer to convert")
    dtype = getattr(torch, config.dtype, config.dtype) if isinstance(config.dtype, str) else config.dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"dtype = {shown(config.dtype)}: give float32, bfloat16 or float16")
    _check_visual_tokens(family.visual_tokens, config, text.vocab_size)
    _check_feature_layers(config)
    _check_mla(config, sizes)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < _LARGEST


def _check_quantization(values: dict[str, Any]) -> None:
    found = values.get("quantization_config", {})
    if not isinstance(found, dict):
        raise InputError(f"quantization_config = {shown(found)}: give a mapping")


def _check_counts(place: str, values: dict[str, Any]) -> None:
    for name in _COUNTS:
        value = values.get(name, 1)
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if not all(map(_is_count, numbers)):
            raise InputError(f"{place}: {name} = {shown(value)}: give a whole number above 0")


def _check_rope(text: Any, family: Family) -> None:
    rope = rope_parameters(text)
    theta: Any = rope.get("rope_theta")
    if type(theta) not in (int, float) or not 0 < theta < math.inf:
        given = getattr(text, "rope_parameters", None)
        raise InputError(f"rope_parameters = {shown(given)}: give a mapping with rope_theta, above 0")
    share: Any = rope.get("partial_rotary_factor", 1)
    if share != 1 and not family.partial_rotary:
        raise InputError(
            f"partial_rotary_factor = {shown(share)} is not supported; supported is RoPE over the whole head"
        )
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise InputError(f"partial_rotary_factor = {shown(share)}: give a share of the head dim, up to 1")


def _check_visual_tokens(names: tuple[str, ...], config: Any, vocabulary: int) -> None:
    for name in names:
        value = getattr(config, name, None)
        if value is not None and not (type(value) is int and 0 <= value < vocabulary):
            raise InputError(
                f"{name} = {shown(value)}: give the id of a token, below the vocabulary's {vocabulary}"
            )


def _check_feature_layers(config: Any) -> None:
    value = getattr(config, "vision_feature_layer", None)
    layers = getattr(config.vision_config, "num_hidden_layers", 0)
    for layer in value if isinstance(value, list) else [value]:
        if value is not None and not (type(layer) is int and -layers <= layer <= layers):
            raise InputError(f"vision_feature_layer = {shown(value)}: the vision model has {layers} layers")


def check_pairs(pairs: torch.Tensor, rotary_dim: int, layer: int, at_read: bool = False) -> None:
    """Raise `InputError` unless a layer's `rope_pairs [G, R/2]` are different pairs of each KV head, of whose
    dims the original rotates the first `rotary_dim`.

    All of them, rotated `at_read`, have to be in order: then layers share what a step makes of positions.
    """
    if pairs.is_meta:
        return
    inside = not pairs.is_floating_point() and bool(((pairs >= 0) & (pairs < rotary_dim // 2)).all())
    if not inside or any(len(set(head)) < len(head) for head in pairs.tolist()):
        raise InputError(
            f"layer {layer}: rope_pairs {pairs.tolist()} are not different whole numbers from 0 "
            f"to {rotary_dim // 2 - 1}; the checkpoint is broken, convert the model again"
        )
    every = torch.arange(rotary_dim // 2).expand(len(pairs), -1)
    if at_read and pairs.shape == every.shape and not torch.equal(pairs.cpu(), every):
        raise InputError(
            f"layer {layer}: rope_pairs are all pairs in another order than 0 to {rotary_dim // 2 - 1}, "
            "which keys that are rotated at read do not have; the checkpoint is broken, convert the model "
            "again"
        )


def _check_mla(config: Any, sizes: AttentionSizes) -> None:
    given, is_converted = getattr(config, "mla", None), config.model_type.endswith("_mla")
    if is_converted and given is None:
        raise InputError("the config has no `mla`; make one by converting a model")
    if given is not None and not is_converted:
        raise InputError(f"`mla` in the config of a {config.model_type}; its model_type was changed")
    if given is not None and not isinstance(given, dict):
        raise InputError(f"mla = {shown(given)}: give a mapping")
    if given is not None:
        MLAConfig.from_dict(given).check(sizes)


def check_finite(model: nn.Module) -> None:
    """Raise `InputError`, naming the weight, for weights that are NaN or infinite; quantised ones are not
    looked at.

    Logits do not show it on every processor: PyTorch's attention on AVX-512 gives 0 for queries that are NaN.
    """
    for name, parameter in model.named_parameters():
        plain = type(parameter) is nn.Parameter and parameter.dtype in _FLOATS and not parameter.is_meta
        if plain and parameter.numel() and not all(end.isfinite() for end in parameter.detach().aminmax()):
            raise InputError(f"{name} has numbers that are not finite; the checkpoint is broken")


def loading_errors(info: dict[str, Any]) -> str:
    """What `from_pretrained` says of weights that are not those of the model, in one line; empty if none."""
    said = [
        f"{what} keys {', '.join(sorted(map(str, info[f'{what}_keys']))[:3])}"
        for what in ("missing", "unexpected")
        if info.get(f"{what}_keys")
    ]
    for name, stored, expected in sorted(map(tuple, info.get("mismatched_keys") or ()))[:1]:
        said.append(f"{name} has shape {list(stored)}, by the config it must be {list(expected)}")
    return "; ".join(said)
