"""Qwen3.5: three of four layers are linear attention and stay; the others have norms and a gate."""

from mha2mla_vlm.model.families.base import Family

FAMILY = Family(
    model_type="qwen3_5",
    model_class="Qwen3_5ForConditionalGeneration",
    config_class="Qwen3_5Config",
    processor_class="Qwen3VLProcessor",
    text_model_types=("qwen3_5_text",),
    visual_tokens=("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
    licence="Qwen3.5 is under Apache 2.0.",
    norms=("q_norm", "k_norm"),
    left_layers=("linear_attention",),
    gated=True,
    partial_rotary=True,
)
