"""Registry of the supported families, by `config.model_type`."""

from typing import Any

from mha2mla_vlm.errors import InputError, shown
from mha2mla_vlm.model.families.base import Family
from mha2mla_vlm.model.families.gemma3 import FAMILY as GEMMA3
from mha2mla_vlm.model.families.gemma4 import FAMILY as GEMMA4
from mha2mla_vlm.model.families.gemma4_unified import FAMILY as GEMMA4_UNIFIED
from mha2mla_vlm.model.families.idefics3 import FAMILY as IDEFICS3
from mha2mla_vlm.model.families.internvl import FAMILY as INTERNVL
from mha2mla_vlm.model.families.llava import FAMILY as LLAVA
from mha2mla_vlm.model.families.llava_next import FAMILY as LLAVA_NEXT
from mha2mla_vlm.model.families.llava_onevision import FAMILY as LLAVA_ONEVISION
from mha2mla_vlm.model.families.mistral3 import FAMILY as MISTRAL3
from mha2mla_vlm.model.families.qwen2_5_vl import FAMILY as QWEN2_5_VL
from mha2mla_vlm.model.families.qwen2_vl import FAMILY as QWEN2_VL
from mha2mla_vlm.model.families.qwen3_5 import FAMILY as QWEN3_5
from mha2mla_vlm.model.families.qwen3_5_moe import FAMILY as QWEN3_5_MOE
from mha2mla_vlm.model.families.qwen3_vl import FAMILY as QWEN3_VL
from mha2mla_vlm.model.families.qwen3_vl_moe import FAMILY as QWEN3_VL_MOE
from mha2mla_vlm.model.families.smolvlm import FAMILY as SMOLVLM
from mha2mla_vlm.model.families.video_llama_3 import FAMILY as VIDEO_LLAMA_3

_ALL = (
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_VL,
    QWEN3_VL_MOE,
    QWEN2_5_VL,
    QWEN2_VL,
    INTERNVL,
    LLAVA_ONEVISION,
    LLAVA_NEXT,
    LLAVA,
    VIDEO_LLAMA_3,
    MISTRAL3,
    IDEFICS3,
    SMOLVLM,
    GEMMA3,
    GEMMA4,
    GEMMA4_UNIFIED,
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}


def get_family(model_type: Any) -> Family:
    """The family of an original or a converted model, by its `model_type`.

    Raises `InputError` with the list of supported families for any other.
    """
    family = FAMILIES.get(model_type.removesuffix("_mla")) if isinstance(model_type, str) else None
    if family is None:
        raise InputError(f"model_type {shown(model_type)} is not supported; supported: {', '.join(FAMILIES)}")
    return family
