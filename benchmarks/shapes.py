"""Attention of the 7B models' shapes, with random weights: what benchmarks of decoding measure or estimate.

Shapes: G KV heads, R rope dims, r latent dims.
"""

from typing import Any

import torch
import transformers
from transformers import LlavaConfig, LlavaNextConfig, PreTrainedConfig, Qwen2_5_VLConfig

from mha2mla_vlm.algorithms.pair_selection import uniform
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.modeling import mla_classes, text_model

HEAD_DIM = 128
SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "qwen2.5-vl-7b": (
        Qwen2_5_VLConfig,
        {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4},
    ),
    "llava-next-8b": (
        LlavaNextConfig,
        {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
    ),
    "llava-1.5-7b": (
        LlavaConfig,
        {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32},
    ),
}


def config_of(shape: str, layers: int) -> PreTrainedConfig:
    """The original's config, whose attention is of a shape, all else tiny."""
    config_class, sizes = SHAPES[shape]
    text: dict[str, Any] = {**sizes, "num_hidden_layers": layers, "intermediate_size": 8, "vocab_size": 16}
    if config_class is Qwen2_5_VLConfig:
        text["rope_parameters"] = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
        vision = {"depth": 1, "hidden_size": 8, "num_heads": 1, "intermediate_size": 8, "out_hidden_size": 8}
    else:
        text |= {"model_type": "llama"}
        vision = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
        vision |= {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
    return config_class(text_config=text, vision_config=vision, image_token_id=2)


def models_of(
    shape: str, layers: int, mla: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[Any, Any]:
    """An original and a converted model of random weights, whose attention is of a shape and of the sizes
    `mla`, all else tiny.
    """
    config = config_of(shape, layers)
    mla_config_class, mla_model = mla_classes(config.model_type)
    mla = {"modalities": ("text", "vision"), **mla}
    values = config.to_dict() | {"model_type": mla_config_class.model_type, "mla": mla}
    with torch.device(device):
        original = getattr(transformers, get_family(config.model_type).model_class)(config)
        converted = mla_model(mla_config_class(**values))
    if "mrope_section" in converted.config.get_text_config().rope_parameters:
        spread_pairs(converted)
    return original.to(dtype).eval(), converted.to(dtype).eval()


def spread_pairs(converted: Any) -> None:
    """Keep pairs from all of a head: with multimodal RoPE the first are of one axis, as in no conversion."""
    for layer in text_model(converted).layers:
        pairs = layer.self_attn.rope_pairs
        pairs.copy_(uniform.pairs(HEAD_DIM // 2, pairs.shape[-1]))


def modes_of(shape: str, budget: float, layers: int) -> dict[str, dict[str, Any]]:
    """Sizes of each mode at a share of the original's 2 * G * D numbers a token, by channel at half of it."""
    heads = SHAPES[shape][1]["num_key_value_heads"]
    numbers = round(2 * heads * HEAD_DIM * budget)
    rope = max(2, round(numbers / heads / 4) // 2 * 2)
    position = 2 * (3 if "qwen" in shape else 1) / 28  # numbers of two bytes, for one of some 28 layers
    rank = int(numbers - position) // 8 * 8  # so that a row begins at a multiple of 16 bytes
    at_read = {"rotate_at": "read", "kv_lora_rank": rank}
    channels = by_channel(numbers, layers)
    return {
        "write": {"qk_rope_head_dim": rope, "kv_lora_rank": numbers - rope * heads},
        "write, by channel": {"qk_rope_head_dim": rope, **by_channel(numbers - rope * heads, layers)},
        f"read {HEAD_DIM}": {**at_read, "qk_rope_head_dim": HEAD_DIM},
        f"read {HEAD_DIM // 4}": {**at_read, "qk_rope_head_dim": HEAD_DIM // 4},
        f"read {HEAD_DIM}, as many in 16 bits": {
            **at_read, "qk_rope_head_dim": HEAD_DIM, "kv_lora_rank": channels["kv_lora_rank"],
        },
        f"read {HEAD_DIM}, by channel": {**at_read, "qk_rope_head_dim": HEAD_DIM, **channels},
    }  # fmt: skip


def by_channel(room: int, layers: int) -> dict[str, Any]:
    """Latents in `room` bytes, half as many channels again, of which an eighth have all 16 bits."""
    bits = [room // 8, room * 3 // 8, room // 2, room // 2]
    return {"kv_lora_rank": sum(bits), "latent_bits": [bits] * layers, "kv_bias": True}
