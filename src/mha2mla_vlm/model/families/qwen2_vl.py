"""Qwen2-VL: tower at native resolution, images and video, multimodal RoPE."""

from mha2mla_vlm.model.families.base import Family

FAMILY = Family(
    model_type="qwen2_vl",
    model_class="Qwen2VLForConditionalGeneration",
    config_class="Qwen2VLConfig",
    processor_class="Qwen2VLProcessor",
    text_model_types=("qwen2_vl_text",),
    visual_tokens=("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
    licence="Qwen2-VL-2B and 7B are under Apache 2.0; 72B is under a licence of its own.",
)
