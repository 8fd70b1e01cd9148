"""SmolVLM (1 and 2): SigLIP tower over tiles; a video's frames are image tokens."""

from mha2mla_vlm.model.families.base import Family

FAMILY = Family(
    model_type="smolvlm",
    model_class="SmolVLMForConditionalGeneration",
    config_class="SmolVLMConfig",
    processor_class="SmolVLMProcessor",
    text_model_types=("llama",),
    visual_tokens=("image_token_id",),
    licence="SmolVLM is under Apache 2.0.",
)
