"""Gemma 3: layers of sliding windows stay; images are seen both ways; each type of layer has its RoPE."""

from mha2mla_vlm.model.families.base import Family

FAMILY = Family(
    model_type="gemma3",
    model_class="Gemma3ForConditionalGeneration",
    config_class="Gemma3Config",
    processor_class="Gemma3Processor",
    text_model_types=("gemma3_text",),
    visual_tokens=("image_token_id", "boi_token_id", "eoi_token_id"),
    licence="Gemma 3 is under the Gemma Terms of Use, which hold for models made from it.",
    norms=("q_norm", "k_norm"),
    left_layers=("sliding_attention",),
    token_types="token_type_ids",
)
