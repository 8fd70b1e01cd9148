"""VideoLLaMA 3: SigLIP tower at native resolution, images and video."""

from mha2mla_vlm.model.families.base import Family

FAMILY = Family(
    model_type="video_llama_3",
    model_class="VideoLlama3ForConditionalGeneration",
    config_class="VideoLlama3Config",
    processor_class="VideoLlama3Processor",
    text_model_types=("qwen2",),
    visual_tokens=("image_token_id", "video_token_id"),
    licence="See the original's licence; its language model is a Qwen2.5.",
)
