"""LLaVA-NeXT: CLIP tower over tiles of any resolution; its row separators are image tokens too."""

from mha2mla_vlm.model.families.base import Family

FAMILY = Family(
    model_type="llava_next",
    model_class="LlavaNextForConditionalGeneration",
    config_class="LlavaNextConfig",
    processor_class="LlavaNextProcessor",
    text_model_types=("llama", "mistral", "qwen2"),
    visual_tokens=("image_token_id",),
    licence=(
        'Where the language model is a Llama, its licence asks that you show "Built with Llama" and, from '
        'Llama 3 on, that the model\'s name begins with "Llama".'
    ),
)
