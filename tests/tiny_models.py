"""Very small random models of the supported families that the zoo does not have, with their real processors.

A name is a family, or a family and which language model it has: `internvl-qwen3`.
"""

import importlib

import pytest
from tokenizers import decoders
from transformers import GenerationConfig, PreTrainedTokenizerFast

from mha2mla_vlm.zoo.architectures import Template, new_model, train_tokenizer
from mha2mla_vlm.zoo.chats import PAGE_MULTIPLE

TINY_MULTIPLE = 24  # pixels that pages are a multiple of
HIDDEN, HEADS, HEAD_DIM, LAYERS = 64, 4, 16, 2
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
QWEN_TOWER = {"depth": 1, "num_heads": 2, "patch_size": 6, "spatial_merge_size": 2}
CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def transformers_class(name):
    """A class of transformers."""
    return getattr(importlib.import_module("transformers"), name)


def tokenizer_of(special, **named):
    """A tokenizer with chat marks and `special` tokens, of which `named` are attributes too."""
    backend = train_tokenizer([*CHAT, *special])
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens=named,
        additional_special_tokens=special,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )


def template(image):
    """A chat template in which an image is this text."""
    roles = {role: f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")}
    end = dict.fromkeys(roles, "<|im_end|>\n")
    return Template(begin="", roles=roles, image=image, end=end, stop="<|im_end|>").jinja()


def text(tokenizer, model_type, kv_heads=2, **more):
    """Values of a language model's config."""
    rope = {"rope_type": "default", "rope_theta": 100.0, **more.pop("rope", {})}
    return {
        "model_type": model_type,
        "vocab_size": 512,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 2048,
        "rope_parameters": rope,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def ids(tokenizer, **tokens):
    """Ids of tokens, by field of a config."""
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def qwen(stem, processor, video, rope, vision, **more):
    """A Qwen-VL model and its processor."""
    tokenizer = tokenizer_of(QWEN_TOKENS)
    sizes = {"patch_size": 6, "merge_size": 2, "min_pixels": 24 * 24, "max_pixels": 96 * 96}
    image = transformers_class("Qwen2VLImageProcessor")(**sizes)
    made = transformers_class(processor)(
        image_processor=image,
        video_processor=transformers_class(video)(**sizes),
        tokenizer=tokenizer,
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    marks = {"image": "image_pad", "video": "video_pad"} | {x: x for x in ("vision_start", "vision_end")}
    config = {
        "text_config": text(tokenizer, f"{stem}_text", rope={"mrope_section": [2, 3, 3], **rope}, **more),
        "vision_config": QWEN_TOWER | {"initializer_range": 0.1, **vision},
        **ids(tokenizer, **{f"{name}_token_id": f"<|{token}|>" for name, token in marks.items()}),
    }
    return config, made


def qwen2_vl():
    """Its tower has an `embed_dim`, and its text no size of a head."""
    vision = {"embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2}
    return qwen("qwen2_vl", "Qwen2VLProcessor", "Qwen2VLVideoProcessor", {}, vision)


def qwen3_vl_moe():
    """Experts in every layer."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": HIDDEN}
    vision |= {"num_position_embeddings": 256, "deepstack_visual_indexes": [0]}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    experts |= {"norm_topk_prob": True}  # which vLLM reads
    given = ({"mrope_interleaved": True}, vision)
    return qwen("qwen3_vl_moe", "Qwen3VLProcessor", "Qwen3VLVideoProcessor", *given, **experts)


def qwen3_5(stem="qwen3_5", share=0.5, **more):
    """Every second layer is linear attention; RoPE over a part of the head's dims."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": HIDDEN}
    vision |= {"num_position_embeddings": 256}
    more |= {"layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    more |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    more |= dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8)
    rope = {"mrope_interleaved": True, "mrope_section": [2, 1, 1], "partial_rotary_factor": share}
    return qwen(stem, "Qwen3VLProcessor", "Qwen3VLVideoProcessor", rope, vision, **more)


def qwen3_5_moe():
    """The same with experts, and one KV head of which a quarter is rotated, as in the released ones."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    experts |= {"shared_expert_intermediate_size": 32}
    return qwen3_5("qwen3_5_moe", 0.25, kv_heads=1, head_dim=32, **experts)


def gemma3():
    """Windows of 8 tokens in every second layer; 4 tokens an image."""
    marks = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = tokenizer_of(list(marks.values()), **marks)
    processor = transformers_class("Gemma3Processor")(
        image_processor=transformers_class("Gemma3ImageProcessor")(size={"height": 24, "width": 24}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=template("<start_of_image>"),
    )
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    rope = {
        kind: {"rope_type": "default", "rope_theta": base}
        for kind, base in zip(layers["layer_types"], (50.0, 100.0), strict=False)
    }
    own = text(tokenizer, "gemma3_text", sliding_window=8, query_pre_attn_scalar=HEAD_DIM, **layers)
    config = {
        "text_config": own | {"rope_parameters": rope},
        "vision_config": TOWER | {"model_type": "siglip_vision_model", "image_size": 24, "patch_size": 6},
        "mm_tokens_per_image": 4,
        **ids(
            tokenizer,
            **{f"{mark.removesuffix('_token')}_token_index": token for mark, token in marks.items()},
        ),
    }
    return config, processor


def gemma4(stem="gemma4", vision=None, **more):
    """Windows of 8 tokens in every second layer; the others have larger heads, fewer of them for keys, which
    are the values too, and RoPE over a quarter of their pairs. Some 64 tokens an image, the least there are.
    """
    names = {"boi": "<|image>", "image": "<|image|>", "eoi": "<image|>"}
    names |= {"boa": "<|audio>", "audio": "<|audio|>", "eoa": "<audio|>"}
    tokenizer = tokenizer_of(
        [*names.values(), "<|video|>"], **{f"{name}_token": token for name, token in names.items()}
    )
    patches = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    name = "Gemma4" if stem == "gemma4" else "Gemma4Unified"
    processor = transformers_class(f"{name}Processor")(
        feature_extractor=transformers_class(f"{name}AudioFeatureExtractor")(),
        image_processor=transformers_class(f"{name}ImageProcessor")(**patches),
        video_processor=transformers_class(f"{name}VideoProcessor")(**patches),
        tokenizer=tokenizer,
        chat_template=template("<|image|>"),
    )
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    rope = {"sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}
    share = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 100.0}
    heads = {"global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
    heads |= {"hidden_size_per_layer_input": 0} if stem == "gemma4" else {}
    own = text(tokenizer, f"{stem}_text", sliding_window=8, **layers, **heads | more)
    own |= {"use_bidirectional_attention": "vision", "final_logit_softcapping": 2.0}
    tower = TOWER | {"head_dim": 16, "num_key_value_heads": 2, "patch_size": 4, "pooling_kernel_size": 2}
    tower |= {"position_embedding_size": 64, "initializer_range": 0.1}
    config = {
        "text_config": own | {"rope_parameters": rope | {"full_attention": share}},
        "vision_config": tower if vision is None else vision,
        "audio_config": None,
        **ids(tokenizer, video_token_id="<|video|>", eoa_token_index="<audio|>"),
        **ids(tokenizer, **{f"{name}_token_id": token for name, token in names.items() if name != "eoa"}),
    }
    return config, processor


def gemma4_moe():
    """With experts, embeddings for each layer, and values of their own."""
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    own = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512, "attention_k_eq_v": False}
    return gemma4(kv_heads=1, **experts, **own)


def gemma4_unified():
    """Patches go to the language model as they are."""
    vision = {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": HIDDEN, "mm_posemb_size": 64}
    return gemma4("gemma4_unified", vision | {"output_proj_dims": HIDDEN, "initializer_range": 0.1})


def internvl(kind="qwen2"):
    """Tiles of 24 pixels a side, 4 tokens each."""
    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
    }
    marks |= {"video_token": "<video>"}
    tokenizer = tokenizer_of(list(marks.values()), **marks)
    size = {"height": 24, "width": 24}
    processor = transformers_class("InternVLProcessor")(
        image_processor=transformers_class("GotOcr2ImageProcessor")(
            size=size, crop_to_patches=True, max_patches=4
        ),
        video_processor=transformers_class("InternVLVideoProcessor")(size=size),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>\n"),
    )
    config = {
        "text_config": text(tokenizer, kind),
        "vision_config": TOWER | {"image_size": [24, 24], "patch_size": [6, 6]},
        "image_seq_length": 4,
        "tie_word_embeddings": False,
        **ids(tokenizer, image_token_id="<IMG_CONTEXT>"),
    }
    return config, processor


def llava_onevision():
    """Tiles of 24 pixels a side, 16 tokens each."""
    tokenizer = tokenizer_of(["<image>", "<video>"], image_token="<image>", video_token="<video>")
    size, points = {"height": 24, "width": 24}, [[24, 24], [24, 48], [48, 24], [48, 48]]
    processor = transformers_class("LlavaOnevisionProcessor")(
        image_processor=transformers_class("LlavaOnevisionImageProcessor")(
            size=size, image_grid_pinpoints=points
        ),
        video_processor=transformers_class("LlavaOnevisionVideoProcessor")(size=size),
        tokenizer=tokenizer,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template("<image>\n"),
    )
    tower = TOWER | {"model_type": "siglip_vision_model", "image_size": 24, "patch_size": 6}
    config = {
        "text_config": text(tokenizer, "qwen2"),
        "vision_config": tower | {"vision_use_head": False},
        "image_grid_pinpoints": points,
        **ids(tokenizer, image_token_index="<image>", video_token_index="<video>"),
    }
    return config, processor


def video_llama_3():
    """Patches of 6 pixels a side, four to a token."""
    tokenizer = tokenizer_of(QWEN_TOKENS)
    sizes = {"patch_size": 6, "merge_size": 2, "min_pixels": 24 * 24, "max_pixels": 96 * 96}
    processor = transformers_class("VideoLlama3Processor")(
        image_processor=transformers_class("VideoLlama3ImageProcessor")(**sizes),
        video_processor=transformers_class("VideoLlama3VideoProcessor")(**sizes),
        tokenizer=tokenizer,
        chat_template=template("<|image_pad|>"),
    )
    config = {
        "text_config": text(tokenizer, "qwen2"),
        "vision_config": TOWER | {"patch_size": 6},
        **ids(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    }
    return config, processor


def mistral3():
    """Patches of 6 pixels a side, four to a token, with marks of rows."""
    marks = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer = tokenizer_of(marks)
    processor = transformers_class("PixtralProcessor")(
        image_processor=transformers_class("PixtralImageProcessor")(
            patch_size={"height": 6, "width": 6}, size={"longest_edge": 96}
        ),
        tokenizer=tokenizer,
        patch_size=6,
        spatial_merge_size=2,
        chat_template=template("[IMG]"),
    )
    tower = TOWER | {"model_type": "pixtral", "image_size": 96, "patch_size": 6, "head_dim": 16}
    config = {
        "text_config": text(tokenizer, "mistral", sliding_window=None),
        "vision_config": tower,
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
        **ids(tokenizer, image_token_index="[IMG]"),
    }
    return config, processor


def idefics3(family="idefics3", stem="Idefics3"):
    """Tiles of 24 pixels a side, 4 tokens each, with marks around them."""
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    marks += [f"<row_{i + 1}_col_{j + 1}>" for i in range(4) for j in range(4)]
    tokenizer = tokenizer_of(marks)
    more = {}
    if family == "smolvlm":
        pytest.importorskip("num2words")
        sizes = {"size": {"longest_edge": 24}, "max_image_size": {"longest_edge": 24}}
        more["video_processor"] = transformers_class("SmolVLMVideoProcessor")(**sizes)
    processor = transformers_class(f"{stem}Processor")(
        image_processor=transformers_class(f"{stem}ImageProcessor")(
            size={"longest_edge": 96}, max_image_size={"longest_edge": 24}
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=template("<image>"),
        **more,
    )
    config = {
        "text_config": text(tokenizer, "llama"),
        "vision_config": TOWER | {"image_size": 24, "patch_size": 6},
        "scale_factor": 2,
        **ids(tokenizer, image_token_id="<image>"),
    }
    return config, processor


TINY = {
    "qwen2_vl": qwen2_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
    "gemma3": gemma3,
    "gemma4": gemma4,
    "gemma4-moe": gemma4_moe,
    "gemma4_unified": gemma4_unified,
    "internvl": internvl,
    "internvl-llama": lambda: internvl("llama"),
    "internvl-qwen3": lambda: internvl("qwen3"),
    "llava_onevision": llava_onevision,
    "video_llama_3": video_llama_3,
    "mistral3": mistral3,
    "idefics3": idefics3,
    "smolvlm": lambda: idefics3("smolvlm", "SmolVLM"),
}


def new_tiny(name):
    """An untrained model, of the zoo or very small, and its processor; weights come from torch's seed."""
    from mha2mla_vlm.model.families import get_family

    if name not in TINY:
        return new_model(name)
    family = get_family(name.partition("-")[0])
    values, processor = TINY[name]()
    model = transformers_class(family.model_class)(transformers_class(family.config_class)(**values))
    tokens = {f"{x}_token_id": getattr(processor.tokenizer, f"{x}_token_id") for x in ("eos", "pad")}
    model.generation_config = GenerationConfig(**tokens, do_sample=False, max_new_tokens=32)
    return model, processor


def page_multiple(name):
    """Pixels that the pages which a model is shown are a multiple of."""
    return PAGE_MULTIPLE.get(name, TINY_MULTIPLE)
