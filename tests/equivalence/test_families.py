"""Every family that the zoo does not have, as very small random models with their real processors."""

import copy

import numpy as np
import pytest
import torch
import transformers
from helpers import (
    answered,
    original,
    piecewise_logits,
    prompt_inputs,
    random_mla,
    real_tokens,
    record,
    set_attention,
    whole_logits,
)
from packaging import version
from reference_attention import ReferenceAttention
from tiny_models import TINY

from mha2mla_vlm import load, load_processor, save
from mha2mla_vlm.config import AttentionSizes
from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.on_disk import convert_checkpoint
from mha2mla_vlm.conversion.pipeline import convert
from mha2mla_vlm.data.records import IGNORE_INDEX, chat_length, encode, encode_with_labels
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.cache.latent import LatentCache, bytes_per_token, cache_bytes
from mha2mla_vlm.model.families import FAMILIES, get_family
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.model.shipped import ZOO_NAMES
from mha2mla_vlm.utils.compat import cache_of

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
STEPPED = {"atol": 1e-4, "rtol": 1e-4}  # linear attention sums otherwise step by step than in chunks
BATCH = ["two images", "text", "image"]
SMALL = {"rope_dim": 8, "rank": 20}


SLOW = ("qwen3_5_moe", "gemma4_unified")  # beside one of the same attention


@pytest.fixture(params=[pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in sorted(TINY)])
def name(request):
    """Each very small model in turn."""
    return request.param


def visual_ids(model):
    return torch.tensor(get_family(model.config.model_type).visual_token_ids(model.config))


def test_no_family_is_left_out():
    assert {name.partition("-")[0] for name in TINY} | {*ZOO_NAMES} == set(FAMILIES)


@pytest.mark.parametrize("rotate_at", ["write", "read"])
def test_full_rank_reproduces_the_original(name, rotate_at):
    model, processor = original(name)
    attention = AttentionSizes.of(model.config)
    rope, whole = attention.rotary_dim, attention.most_latent_dims // attention.kv_heads
    d_kv = min(whole, 2 * attention.head_dim - (rope if rotate_at == "write" else 0))
    sizes = {"d_kv": d_kv} | ({"qk_rope_head_dim": rope} if rotate_at == "write" else {})
    before = copy.deepcopy(model.state_dict())
    small = convert(model, processor, answered(name, 3), ConversionConfig(**sizes, rotate_at=rotate_at))
    inputs = prompt_inputs(name, processor, BATCH)
    expected = real_tokens(whole_logits(model, inputs), inputs)
    assert expected.std() > 0.1
    close = STEPPED if attention.left else CLOSE
    torch.testing.assert_close(real_tokens(whole_logits(small, inputs), inputs), expected, **close)
    assert small.mla_config.kl["factorization"] < 1e-6
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("rotate_at", ["write", "read"])
def test_all_ways_agree_at_low_rank(name, rotate_at):
    """Batched, absorbed, expanded and cached attention, and a second writing of the formulas."""
    if "gemma" in name and version.parse(transformers.__version__) < version.parse("5.18"):
        pytest.skip("Gemma 3 and 4 themselves fail at pieces longer than their window")
    model, processor = random_mla(name, **SMALL, rotate_at=rotate_at)
    batch = prompt_inputs(name, processor, BATCH)
    close = STEPPED if AttentionSizes.of(model.config).left else CLOSE
    together = whole_logits(model, batch)
    inputs = prompt_inputs(name, processor, ["two images"])
    expected, total = whole_logits(model, inputs), inputs["input_ids"].shape[1]
    torch.testing.assert_close(together[0, -total:], expected[0], **close)
    for limit in (0, 10**6):
        cache = LatentCache()
        set_attention(model, absorb_limit=limit)
        got = piecewise_logits(model, inputs, [total - 4, total - 1], cache)
        torch.testing.assert_close(got, expected, **close)
        assert cache_bytes(cache) == total * bytes_per_token(model.config, itemsize=4)
    visual = torch.isin(inputs["input_ids"], visual_ids(model))
    for seen in (visual, torch.zeros_like(visual)):
        written = copy.deepcopy(model)
        layer = decoder_layers(written)[-1]
        layer.self_attn = ReferenceAttention(layer.self_attn, seen, inputs["attention_mask"])
        alike = torch.allclose(whole_logits(written, inputs), expected, **close)
        assert alike == bool(seen.any())  # not where visual tokens are taken for text


def test_saved_is_loaded_and_answers(name, tmp_path):
    model, processor = random_mla(name, **SMALL)
    folder = save(model, processor, tmp_path / "model")
    loaded, own = load(folder), load_processor(folder)
    assert type(loaded) is type(model)
    assert type(own) is type(processor)
    inputs = prompt_inputs(name, own, ["image"])
    torch.testing.assert_close(whole_logits(loaded, inputs), whole_logits(model, inputs))
    answer = loaded.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    assert isinstance(cache_of(answer), LatentCache)
    total = answer.sequences.shape[1]
    assert cache_bytes(cache_of(answer)) == (total - 1) * bytes_per_token(model.config, itemsize=4)
    with torch.no_grad():
        again = loaded(**inputs | {"input_ids": inputs["input_ids"]}, use_cache=False).logits[0, -1]
    assert int(again.argmax()) == int(answer.sequences[0, inputs["input_ids"].shape[1]])


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_are_the_answers(name, side):
    model, processor = original(name)
    processor.tokenizer.padding_side = side
    records = answered(name, 3, ["two turns", "text", "two images"])
    batch = encode_with_labels(processor, records, visual_ids(model).tolist())
    for row, chat in enumerate(records):
        labels = batch["labels"][row]
        text = processor.tokenizer.decode(labels[labels != IGNORE_INDEX])
        assert text == "7<|im_end|>" * len(chat.answers())
        alone = encode(processor, [chat])["input_ids"][0]
        assert torch.equal(batch["input_ids"][row][batch["attention_mask"][row].bool()], alone)
        assert chat_length(processor, chat) == len(alone)


def test_images_and_videos_are_visual_tokens(name):
    model, processor = original(name)
    shown = encode(processor, [record(name, "image"), record(name, "text")])["input_ids"]
    assert torch.isin(shown, visual_ids(model)).any(1).tolist() == [True, False]
    video = getattr(processor, "video_token", None)
    if video is None or getattr(processor, "video_processor", None) is None:
        return
    frames = np.zeros((4, 24, 24, 3), dtype=np.uint8)
    text = processor.apply_chat_template(record(name, "text").messages, tokenize=False) + video
    inputs = processor(
        text=[text],
        videos=[[frames]] if name == "smolvlm" else [frames],
        do_sample_frames=False,
        return_tensors="pt",
    )
    visual = torch.isin(inputs["input_ids"], visual_ids(model))
    assert int(visual.sum()) >= 2
    small, _ = random_mla(name, **SMALL)
    with torch.no_grad():
        assert bool(small(**inputs, use_cache=False).logits.isfinite().all())


def with_norms(attention):
    attention.k_norm = torch.nn.RMSNorm(attention.head_dim)


def with_half_of_the_norms(attention):
    del attention.q_norm


def with_norms_over_all_heads(attention):
    attention.k_norm.weight = torch.nn.Parameter(torch.ones(attention.k_proj.out_features))


def with_sinks(attention):
    attention.sinks = torch.nn.Parameter(torch.zeros(4))


def not_causal(attention):
    attention.is_causal = False


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("idefics3", with_norms, "has q_proj, k_proj, v_proj, o_proj, k_norm; supported is"),
        ("idefics3", with_sinks, "sinks; supported is"),
        ("idefics3", not_causal, "not causal"),
        ("internvl-qwen3", with_half_of_the_norms, "with or without q_norm and k_norm over a head"),
        ("internvl-qwen3", with_norms_over_all_heads, "with or without q_norm and k_norm over a head"),
    ],
)
def test_attention_that_would_lose_something_is_refused(family, change, message):
    model, processor = original(family)
    change(decoder_layers(model)[1].self_attn)
    with pytest.raises(InputError, match=f"layer 1: attention.*{message}"):
        convert(model, processor, answered(family, 3), ConversionConfig())


def test_an_unknown_language_model_is_refused():
    model, processor = original("internvl")
    model.config.text_config.model_type = "gpt_oss"
    message = "'gpt_oss' is not supported in internvl; supported: qwen2, qwen3, llama"
    with pytest.raises(InputError, match=message):
        convert(model, processor, answered("internvl", 3), ConversionConfig())


@pytest.mark.parametrize("family", ["idefics3", "qwen3_vl_moe"])
def test_a_checkpoint_on_disk_is_converted_as_in_memory(family, tmp_path):
    """Where the language model has another name, and where layers hold experts."""
    model, processor = original(family)
    folder, config = save(model, processor, tmp_path / "original"), ConversionConfig(budget=0.5)
    records = answered(family, 3)
    convert_checkpoint(folder, records, tmp_path / "small", config)
    small = load(tmp_path / "small")
    processor = load_processor(folder)  # with the oldest torchvision it resizes in another way
    expected = convert(model, processor, records, config)
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(small.state_dict()[key], value, msg=key)
