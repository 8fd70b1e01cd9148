"""`config.json` of originals and of converted models."""

from cases import CONVERT, GENERATE, Case, edited, text

ORIGINAL = {
    "empty": (text("model/config.json", ""), "config"),
    "broken": (text("model/config.json", "{"), "config"),
    "a list": (text("model/config.json", "[]"), "config"),
    "a number": (text("model/config.json", "7"), "config"),
    "nothing": (text("model/config.json", "null"), "config"),
    "not text": (text("model/config.json", b"\xff\xfe\x00"), "config"),
    "deep nesting": (text("model/config.json", "[" * 100_000), "config"),
    "a number of thousands of digits": (text("model/config.json", '{"a": ' + "9" * 10_000 + "}"), "config"),
}
VALUES = {
    "no type": ({"model_type": ...}, "model"),
    "a type that is not supported": ({"model_type": "bert"}, "bert"),
    "a type that there is not": ({"model_type": "x" * 50}, "x" * 50),
    "a type that is a number": ({"model_type": 7}, "model_type"),
    "a type that is a list": ({"model_type": ["llava"]}, "model_type"),
    "a text config that is a number": ({"text_config": 5}, "text_config"),
    "a text config that is text": ({"text_config": "llama"}, "text_config"),
    "a text config that is a list": ({"text_config": [1]}, "text_config"),
    "a text model of another kind": ({"text_config__model_type": "bert"}, "bert"),
    "a text model that there is not": ({"text_config__model_type": "nothing"}, "nothing"),
    "a text model with other attention": ({"text_config__model_type": "gpt2"}, "gpt2"),
    "a vision config that is a number": ({"vision_config": 5}, "vision_config"),
    "a vision model that there is not": ({"vision_config__model_type": "nothing"}, "nothing"),
    "no heads": ({"text_config__num_attention_heads": 0}, "num_attention_heads"),
    "heads below 0": ({"text_config__num_attention_heads": -4}, "num_attention_heads"),
    "heads that are text": ({"text_config__num_attention_heads": "4"}, "num_attention_heads"),
    "heads that are nothing": ({"text_config__num_attention_heads": None}, "num_attention_heads"),
    "heads beyond count": ({"text_config__num_attention_heads": 10**30}, "num_attention_heads"),
    "no KV heads": ({"text_config__num_key_value_heads": 0}, "num_key_value_heads"),
    "KV heads that do not divide": ({"text_config__num_key_value_heads": 3}, "num_key_value_heads"),
    "KV heads that are a list": ({"text_config__num_key_value_heads": [4]}, "num_key_value_heads"),
    "more KV heads than heads": ({"text_config__num_key_value_heads": 8}, "num_key_value_heads"),
    "no layers": ({"text_config__num_hidden_layers": 0}, "num_hidden_layers"),
    "layers below 0": ({"text_config__num_hidden_layers": -1}, "num_hidden_layers"),
    "layers with fractions": ({"text_config__num_hidden_layers": 2.5}, "num_hidden_layers"),
    "more layers than weights": ({"text_config__num_hidden_layers": 5}, "missing"),
    "fewer layers than weights": ({"text_config__num_hidden_layers": 3}, "unexpected"),
    "no head dim": ({"text_config__head_dim": 0}, "head_dim"),
    "an odd head dim": ({"text_config__head_dim": 63}, "head_dim"),
    "another head dim": ({"text_config__head_dim": 32}, "has shape"),
    "a head dim that is text": ({"text_config__head_dim": "64"}, "head_dim"),
    "no width": ({"text_config__hidden_size": 0}, "hidden_size"),
    "a width below 0": ({"text_config__hidden_size": -256}, "hidden_size"),
    "another width": ({"text_config__hidden_size": 128}, ""),
    "no vocabulary": ({"text_config__vocab_size": 0}, "vocab_size"),
    "another vocabulary": ({"text_config__vocab_size": 100}, "has shape"),
    "an activation that there is not": ({"text_config__hidden_act": "best"}, "best"),
    "rope parameters that are a list": ({"text_config__rope_parameters": [1]}, "rope"),
    "rope parameters that are text": ({"text_config__rope_parameters": "default"}, "rope"),
    "rope that there is not": (
        {"text_config__rope_parameters": {"rope_type": "best", "rope_theta": 1e4}},
        "best",
    ),
    "rope of base 0": ({"text_config__rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "rope"),
    "rope of a base below 0": (
        {"text_config__rope_parameters": {"rope_type": "default", "rope_theta": -1e4}},
        "rope",
    ),
    "rope of a base that is text": (
        {"text_config__rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
        "rope",
    ),
    "a part of each head rotated": (
        {
            "text_config__rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            }
        },
        "partial_rotary_factor",
    ),
    "a dtype that there is not": ({"dtype": "float7"}, "float7"),
    "a dtype that is a number": ({"dtype": 16}, "dtype"),
    "a dtype of whole numbers": ({"dtype": "int8"}, "int8"),
    "an image token that is text": ({"image_token_index": "<image>"}, "image_token"),
    "an image token below 0": ({"image_token_index": -1}, "image_token"),
    "an image token beyond the vocabulary": ({"image_token_index": 10**6}, "image_token"),
    "layers to look at that there are not": ({"vision_feature_layer": 99}, "vision_feature_layer"),
    "a way to look that there is not": ({"vision_feature_select_strategy": "best"}, "best"),
    "images of no size": ({"vision_config__image_size": 0}, "image_size"),
    "patches of no size": ({"vision_config__patch_size": 0}, "patch_size"),
    "no vision heads": ({"vision_config__num_attention_heads": 0}, "num_attention_heads"),
    "a quantised model": ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    "a quantised text model": ({"text_config__quantization_config": {"quant_method": "gptq"}}, "gptq"),
    "a quantised model of no kind": ({"quantization_config": {}}, "quantised"),
    "a quantised model that is text": ({"quantization_config": "awq"}, "quantization_config"),
    "code of its own": ({"model_type": "foreign", "auto_map": {"AutoConfig": "code.C"}}, "foreign"),
}
MLA = {
    "a number": ({"mla": 5}, "mla"),
    "a list": ({"mla": []}, "mla"),
    "text": ({"mla": "yes"}, "mla"),
    "empty": ({"mla": {}}, "missing"),
    "of nothing": ({"mla": None}, "mla"),
    "an unknown key": ({"mla__fast": True}, "fast"),
    "no rope dims": ({"mla__qk_rope_head_dim": ...}, "qk_rope_head_dim"),
    "rope dims of nothing": ({"mla__qk_rope_head_dim": None}, "qk_rope_head_dim"),
    "rope dims of 0": ({"mla__qk_rope_head_dim": 0}, "R = 0"),
    "rope dims below 0": ({"mla__qk_rope_head_dim": -2}, "R = -2"),
    "rope dims that are odd": ({"mla__qk_rope_head_dim": 7}, "R = 7"),
    "rope dims beyond the head": ({"mla__qk_rope_head_dim": 66}, "R = 66"),
    "rope dims with fractions": ({"mla__qk_rope_head_dim": 16.0}, "qk_rope_head_dim"),
    "rope dims that are true": ({"mla__qk_rope_head_dim": True}, "qk_rope_head_dim"),
    "rope dims of a layer that is text": ({"mla__qk_rope_head_dim": [16, 16, 16, "16"]}, "qk_rope_head_dim"),
    "rope dims of too few layers": ({"mla__qk_rope_head_dim": [16]}, "lists 1 layers"),
    "rope dims of no layers": ({"mla__qk_rope_head_dim": []}, "lists 0 layers"),
    "rope dims of too many layers": ({"mla__qk_rope_head_dim": [16] * 9}, "lists 9 layers"),
    "other rope dims than the weights": ({"mla__qk_rope_head_dim": 8}, "has shape"),
    "a rank of 0": ({"mla__kv_lora_rank": 0}, "kv_lora_rank 0"),
    "a rank below 0": ({"mla__kv_lora_rank": -1}, "kv_lora_rank -1"),
    "a rank beyond all": ({"mla__kv_lora_rank": 10**30}, "kv_lora_rank 100"),
    "a rank that is text": ({"mla__kv_lora_rank": "40"}, "kv_lora_rank"),
    "ranks of too few layers": ({"mla__kv_lora_rank": [40, 40]}, "lists 2 layers"),
    "a rank that is nothing in one layer": ({"mla__kv_lora_rank": [40, 40, 40, None]}, "kv_lora_rank"),
    "another rank than the weights": ({"mla__kv_lora_rank": 32}, "has shape"),
    "no rank where weights have one": ({"mla__kv_lora_rank": None}, "unexpected keys"),
    "modalities that are a number": ({"mla__modalities": 5}, "modalities"),
    "modalities that are text": ({"mla__modalities": "text"}, "modalities"),
    "modalities of nothing": ({"mla__modalities": None}, "modalities"),
    "modalities that there are not": ({"mla__modalities": ["text", "sound"]}, "sound"),
    "modalities of lists": ({"mla__modalities": [["text"], ["vision"]]}, "modalities"),
    "one modality where weights have two": ({"mla__modalities": ["shared"]}, "missing keys"),
    "no modalities": ({"mla__modalities": []}, "modalities"),
    "a time to rotate that there is not": ({"mla__rotate_at": "both"}, "rotate_at 'both'"),
    "times to rotate of other layers": ({"mla__rotate_at": ["read"]}, "rotate_at lists 1 layers"),
    "a selection that is a number": ({"mla__rope_selection": 5}, "rope_selection"),
    "a factorisation that is a list": ({"mla__factorization": ["svd"]}, "factorization"),
    "folded that is text": ({"mla__folded": "yes"}, "folded"),
    "a bias that is a number": ({"mla__kv_bias": 5}, "kv_bias"),
    "losses that are a list": ({"mla__kl": [1]}, "kl"),
    "losses that are text": ({"mla__kl": {"all": "small"}}, "kl"),
    "predicted losses that are a number": ({"mla__predicted_kl": 1}, "predicted_kl"),
    "predicted losses of too few layers": ({"mla__predicted_kl": [0.1]}, "predicted_kl"),
    "an original that is a number": ({"mla__original": 5}, "original"),
    "the type of the original": ({"model_type": "llava"}, ""),
    "another family": ({"model_type": "qwen2_5_vl_mla"}, ""),
}
CASES = {
    **{
        f"original: {k}": Case(command=CONVERT, change=change, named=n) for k, (change, n) in ORIGINAL.items()
    },
    **{
        f"original: {name}": Case(command=CONVERT, change=edited("model/config.json", **values), named=named)
        for name, (values, named) in VALUES.items()
    },
    **{
        f"mla: {name}": Case(command=GENERATE, change=edited("small/config.json", **values), named=named)
        for name, (values, named) in MLA.items()
    },
    **{
        f"inspect: {name}": Case(
            command="inspect small", change=edited("small/config.json", **values), named=named
        )
        for name, (values, named) in MLA.items()
        if named
        not in ("", "has shape", "missing keys", "unexpected keys")  # those are seen in the weights alone
    },
}
