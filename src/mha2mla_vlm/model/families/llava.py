"""LLaVA-1.5: CLIP tower at a fixed resolution."""

from mha2mla_vlm.model.families.base import Family

FAMILY = Family(
    model_type="llava",
    model_class="LlavaForConditionalGeneration",
    config_class="LlavaConfig",
    processor_class="LlavaProcessor",
    text_model_types=("llama", "mistral", "qwen2"),
    visual_tokens=("image_token_id",),
    licence=(
        'Where the language model is a Llama, its licence asks that you show "Built with Llama" and, from '
        'Llama 3 on, that the model\'s name begins with "Llama".'
    ),
)
