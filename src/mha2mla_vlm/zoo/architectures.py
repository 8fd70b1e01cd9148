"""What each zoo model is before training: its config, tokenizer, processor and chat template.

Real classes of four families at a size of four million parameters. One visual token stands
for 12 x 12 pixels of a page whose digits are 24 pixels wide.
"""

import json
import string
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from mha2mla_vlm.zoo.digits import CELL

HIDDEN, HEAD_DIM, HEADS, LAYERS, MLP = 256, 64, 4, 4, 640
VISION_HIDDEN, VISION_MLP, VISION_HEADS, VISION_LAYERS = 160, 384, 4, 4
VOCAB = 512
PATCH = CELL // 2  # pixels a side of one visual token
TILE = 2 * CELL  # LLaVA-NeXT's tile, pixels a side
PAGE = 4 * CELL  # LLaVA-1.5's fixed page

# Words that questions use, and printable characters once each, so that any ASCII text has short tokens.
CORPUS = 2 * [
    "Which digit is in row 1, column 2?",
    "How many digits are 7?",
    "Which digit is the largest in row 3?",
    "Picture 1: Read all digits.",
    "USER: ASSISTANT:",
    "user\n\n",
    "assistant\n\n",
    "system\n\n",
    string.printable,
]
# Words, then single digits, then everything else, as Qwen2 and Llama 3 split their text.
PRE_TOKENIZE = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, kw_only=True)
class Template:
    """Chat template of a family: what stands around the pieces of a message."""

    begin: str  # before the first message
    roles: dict[str, str]  # role -> text that opens a message of that role
    image: str
    end: dict[str, str]  # role -> text that closes it
    stop: str  # the token that ends an answer

    def jinja(self) -> str:
        """The template in the language of transformers."""
        body = (
            "{{ BEGIN }}{% for message in messages %}{{ ROLES[message['role']] }}"
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
            "{% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}{{ IMAGE }}"
            "{% elif part['type'] == 'video' %}{{ IMAGE | replace('image_pad', 'video_pad') }}"
            "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
            "{{ END[message['role']] }}{% endfor %}"
            "{% if add_generation_prompt %}{{ PROMPT }}{% endif %}"
        )
        values = {
            "BEGIN": self.begin,
            "ROLES": self.roles,
            "IMAGE": self.image,
            "END": self.end,
            "PROMPT": self.roles["assistant"],
        }
        return "".join(f"{{% set {name} = {value!r} %}}" for name, value in values.items()) + body


def _roles(pattern: str) -> dict[str, str]:
    return {role: pattern.format(role) for role in ("system", "user", "assistant")}


def train_tokenizer(special: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer over the zoo's questions, with `special` as its first tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _plain_tokenizer(special: list[str], **names: str) -> PreTrainedTokenizerFast:
    backend = train_tokenizer(special)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        **names,
    )


def _text(*, kv_heads: int, rope_theta: float, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.04,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta, **more},
    }


def _clip(image_size: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=VISION_HIDDEN,
        intermediate_size=VISION_MLP,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=VISION_HEADS,
        image_size=image_size,
        patch_size=PATCH,
        projection_dim=HIDDEN,
    )


def _qwen2_5_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    processor = _qwen_processor(Qwen2_5_VLProcessor, Qwen2VLVideoProcessor)
    model = Qwen2_5_VLForConditionalGeneration(_qwen2_5_vl_config(processor.tokenizer))
    return _with_generation(model, processor.tokenizer), processor


def _qwen3_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    processor = _qwen_processor(Qwen3VLProcessor, Qwen3VLVideoProcessor)
    model = Qwen3VLForConditionalGeneration(_qwen3_vl_config(processor.tokenizer))
    return _with_generation(model, processor.tokenizer), processor


def _qwen_processor(kind: Any, video_kind: Any) -> Any:
    """The processor of a Qwen family, of its classes; all have the same special tokens and chats."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    backend = train_tokenizer(special).model
    files = _model_files(backend)
    tokenizer = Qwen2Tokenizer(
        vocab=files["vocab"],
        merges=files["merges"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=special[1:],
        padding_side="left",
    )
    template = Template(
        begin="",
        roles=_roles("<|im_start|>{}\n"),
        image="<|vision_start|><|image_pad|><|vision_end|>",
        end=dict.fromkeys(("system", "user", "assistant"), "<|im_end|>\n"),
        stop="<|im_end|>",
    )
    sizes = {
        "patch_size": PATCH // 2,
        "merge_size": 2,
        "min_pixels": CELL * CELL,
        "max_pixels": (8 * CELL) ** 2,
    }
    return kind(
        image_processor=Qwen2VLImageProcessor(**sizes),
        video_processor=video_kind(**sizes),
        tokenizer=tokenizer,
        chat_template=template.jinja(),
    )


def _qwen_tokens(tokenizer: Any) -> dict[str, int]:
    """Ids of the visual tokens, by field of the config."""
    fields = {"image": "image_pad", "video": "video_pad"}
    fields |= {name: name for name in ("vision_start", "vision_end")}
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in fields.items()}
    return {f"{name}_token_id": found for name, found in ids.items()}


def _qwen_text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    # A small theta: at 1e6 the width pairs would hardly turn over a page of eight tokens.
    text = _text(kv_heads=2, rope_theta=100.0, mrope_section=[8, 12, 12], **more)
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    return text | {"pad_token_id": tokenizer.pad_token_id}


def _qwen3_vl_config(tokenizer: Any) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config=_qwen_text(tokenizer, mrope_interleaved=True) | {"head_dim": HEAD_DIM},
        vision_config={
            "depth": VISION_LAYERS,
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": VISION_MLP,
            "num_heads": VISION_HEADS,
            "out_hidden_size": HIDDEN,
            "patch_size": PATCH // 2,
            "num_position_embeddings": 16 * 16,
            "deepstack_visual_indexes": [0, 2],
            "initializer_range": 0.04,
        },
        **_qwen_tokens(tokenizer),
    )


def _qwen2_5_vl_config(tokenizer: Any) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config=_qwen_text(tokenizer),
        vision_config={
            "depth": VISION_LAYERS,
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": VISION_MLP,
            "num_heads": VISION_HEADS,
            "out_hidden_size": HIDDEN,
            "patch_size": PATCH // 2,
            "window_size": CELL,
            "fullatt_block_indexes": [1, 3],
            "initializer_range": 0.04,
        },
        **_qwen_tokens(tokenizer),
    )


def _model_files(model: models.BPE) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = (Path(path) for path in model.save(folder))
        pairs = merges.read_text(encoding="utf-8").splitlines()
        return {
            "vocab": json.loads(vocab.read_text(encoding="utf-8")),
            "merges": [tuple(line.split(" ")) for line in pairs if not line.startswith("#version")],
        }


def _llava_next() -> tuple[PreTrainedModel, ProcessorMixin]:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    special += ["<|eot_id|>", "<pad>", "<image>"]
    tokenizer = _plain_tokenizer(
        special, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<pad>"
    )
    template = Template(
        begin="<|begin_of_text|>",
        roles=_roles("<|start_header_id|>{}<|end_header_id|>\n\n"),
        image="<image>\n",
        end=dict.fromkeys(("system", "user", "assistant"), "<|eot_id|>"),
        stop="<|eot_id|>",
    )
    pinpoints = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": TILE},
            crop_size={"height": TILE, "width": TILE},
            image_grid_pinpoints=[[TILE, TILE], *pinpoints],
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template.jinja(),
    )
    config = LlavaNextConfig(
        vision_config=_clip(TILE),
        text_config=_llama(tokenizer, kv_heads=2),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[TILE, TILE], *pinpoints],
        image_seq_length=(TILE // PATCH) ** 2,
        vision_feature_layer=-1,
    )
    return _with_generation(LlavaNextForConditionalGeneration(config), tokenizer), processor


def _llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    tokenizer = _plain_tokenizer(
        special, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    template = Template(
        begin="<s>",
        roles={"system": "", "user": "USER: ", "assistant": "ASSISTANT: "},
        image="<image>\n",
        end={"system": " ", "user": " ", "assistant": "</s>"},
        stop="</s>",
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": PAGE}, crop_size={"height": PAGE, "width": PAGE}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template.jinja(),
    )
    config = LlavaConfig(
        vision_config=_clip(PAGE),
        text_config=_llama(tokenizer, kv_heads=HEADS),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(PAGE // PATCH) ** 2,
        vision_feature_layer=-1,
    )
    return _with_generation(LlavaForConditionalGeneration(config), tokenizer), processor


def _llama(tokenizer: PreTrainedTokenizerFast, *, kv_heads: int) -> LlamaConfig:
    return LlamaConfig(
        **_text(kv_heads=kv_heads, rope_theta=10000.0),
        head_dim=HEAD_DIM,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _with_generation(model: PreTrainedModel, tokenizer: Any) -> PreTrainedModel:
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=32,
    )
    return model


_BUILDERS: dict[str, Callable[[], tuple[PreTrainedModel, ProcessorMixin]]] = {
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "llava_next": _llava_next,
    "llava": _llava,
}


def new_model(name: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The untrained model and the processor of a zoo name; weights come from torch's global seed."""
    return _BUILDERS[name]()
