"""Idefics3: SigLIP tower over tiles; marks around tiles count as text."""

from mha2mla_vlm.model.families.base import Family

FAMILY = Family(
    model_type="idefics3",
    model_class="Idefics3ForConditionalGeneration",
    config_class="Idefics3Config",
    processor_class="Idefics3Processor",
    text_model_types=("llama",),
    visual_tokens=("image_token_id",),
    licence=(
        'Where the language model is a Llama, its licence asks that you show "Built with Llama" and, from '
        'Llama 3 on, that the model\'s name begins with "Llama".'
    ),
)
