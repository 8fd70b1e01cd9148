"""Gemma 4 (26B-A4B, 31B): of `gemma3`, and values are normed and often what keys are made of."""

from mha2mla_vlm.model.families.base import Family

FAMILY = Family(
    model_type="gemma4",
    model_class="Gemma4ForConditionalGeneration",
    config_class="Gemma4Config",
    processor_class="Gemma4Processor",
    text_model_types=("gemma4_text",),
    visual_tokens=("image_token_id", "video_token_id", "boi_token_id", "eoi_token_id"),
    licence="Gemma 4 is under Apache 2.0.",
    norms=("q_norm", "k_norm", "v_norm"),
    left_layers=("sliding_attention",),
    partial_rotary=True,
    values_of_keys=True,
)
