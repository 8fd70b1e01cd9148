"""Qwen3-VL: normed queries and keys, interleaved multimodal RoPE, visual features added between layers."""

from mha2mla_vlm.model.families.base import Family

FAMILY = Family(
    model_type="qwen3_vl",
    model_class="Qwen3VLForConditionalGeneration",
    config_class="Qwen3VLConfig",
    processor_class="Qwen3VLProcessor",
    text_model_types=("qwen3_vl_text",),
    visual_tokens=("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
    licence="Qwen3-VL is under Apache 2.0.",
    norms=("q_norm", "k_norm"),
)
