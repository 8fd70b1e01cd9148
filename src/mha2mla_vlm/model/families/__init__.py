"""Registry of the supported families, by `config.model_type`."""

from typing import Any

from mha2mla_vlm.errors import InputError, shown
from mha2mla_vlm.model.families import (
    gemma3,
    idefics3,
    internvl,
    llava,
    llava_next,
    llava_onevision,
    mistral3,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_5_moe,
    qwen3_vl,
    qwen3_vl_moe,
    smolvlm,
    video_llama_3,
)
from mha2mla_vlm.model.families.base import Family

_MODULES = (
    qwen3_5,
    qwen3_5_moe,
    qwen3_vl,
    qwen3_vl_moe,
    qwen2_5_vl,
    qwen2_vl,
    internvl,
    llava_onevision,
    llava_next,
    llava,
    video_llama_3,
    mistral3,
    idefics3,
    smolvlm,
    gemma3,
)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}


def get_family(model_type: Any) -> Family:
    """The family of an original or a converted model, by its `model_type`.

    Raises `InputError` with the list of supported families for any other.
    """
    family = FAMILIES.get(model_type.removesuffix("_mla")) if isinstance(model_type, str) else None
    if family is None:
        raise InputError(f"model_type {shown(model_type)} is not supported; supported: {', '.join(FAMILIES)}")
    return family
