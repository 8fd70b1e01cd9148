"""LLaVA-OneVision: SigLIP tower over tiles of any resolution, and video."""

from mha2mla_vlm.model.families.base import Family

FAMILY = Family(
    model_type="llava_onevision",
    model_class="LlavaOnevisionForConditionalGeneration",
    config_class="LlavaOnevisionConfig",
    processor_class="LlavaOnevisionProcessor",
    text_model_types=("qwen2",),
    visual_tokens=("image_token_id", "video_token_id"),
    licence="See the original's licence; its language model is a Qwen2.",
)
