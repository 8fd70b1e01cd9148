"""Qwen3-VL with a mixture of experts: attention is that of `qwen3_vl`."""

from mha2mla_vlm.model.families.base import Family

FAMILY = Family(
    model_type="qwen3_vl_moe",
    model_class="Qwen3VLMoeForConditionalGeneration",
    config_class="Qwen3VLMoeConfig",
    processor_class="Qwen3VLProcessor",
    text_model_types=("qwen3_vl_moe_text",),
    visual_tokens=("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
    licence="Qwen3-VL is under Apache 2.0.",
    norms=("q_norm", "k_norm"),
)
