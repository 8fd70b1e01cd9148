"""InternVL (2.5 to 3.5, in transformers' format): tiles of one size; a video's frames are image tokens."""

from mha2mla_vlm.model.families.base import Family

FAMILY = Family(
    model_type="internvl",
    model_class="InternVLForConditionalGeneration",
    config_class="InternVLConfig",
    processor_class="InternVLProcessor",
    text_model_types=("qwen2", "qwen3", "llama"),
    visual_tokens=("image_token_id",),
    licence=(
        'Where the language model is a Llama, its licence asks that you show "Built with Llama" and, from '
        'Llama 3 on, that the model\'s name begins with "Llama".'
    ),
    norms=("q_norm", "k_norm"),
)
