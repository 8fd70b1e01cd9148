"""Qwen2.5-VL: window-attention tower at native resolution, images and video, multimodal RoPE."""

from mha2mla_vlm.model.families.base import Family

FAMILY = Family(
    model_type="qwen2_5_vl",
    model_class="Qwen2_5_VLForConditionalGeneration",
    config_class="Qwen2_5_VLConfig",
    processor_class="Qwen2_5_VLProcessor",
    text_model_types=("qwen2_5_vl_text",),
    visual_tokens=("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
    licence="Qwen2.5-VL-7B is under Apache 2.0; 3B and 72B are under licences of their own.",
)
