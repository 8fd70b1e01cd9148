"""Gemma 4 without a vision tower (12B): attention is that of `gemma4`."""

from mha2mla_vlm.model.families.base import Family

FAMILY = Family(
    model_type="gemma4_unified",
    model_class="Gemma4UnifiedForConditionalGeneration",
    config_class="Gemma4UnifiedConfig",
    processor_class="Gemma4UnifiedProcessor",
    text_model_types=("gemma4_unified_text",),
    visual_tokens=("image_token_id", "video_token_id", "boi_token_id", "eoi_token_id"),
    licence="Gemma 4 is under Apache 2.0.",
    norms=("q_norm", "k_norm", "v_norm"),
    left_layers=("sliding_attention",),
    partial_rotary=True,
    values_of_keys=True,
)
