"""Mistral Small 3.1 and 3.2: Pixtral tower at native resolution; marks of rows count as text."""

from mha2mla_vlm.model.families.base import Family

FAMILY = Family(
    model_type="mistral3",
    model_class="Mistral3ForConditionalGeneration",
    config_class="Mistral3Config",
    processor_class="PixtralProcessor",
    text_model_types=("mistral",),
    visual_tokens=("image_token_id",),
    licence="Mistral Small 3.1 and 3.2 are under Apache 2.0.",
)
