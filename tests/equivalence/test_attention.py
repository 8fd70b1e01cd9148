"""All ways to compute a converted model's attention agree, with each other and with a second writing."""

import copy
import itertools

import pytest
import torch
from helpers import (
    PROMPTS,
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
from reference_attention import ReferenceAttention
from transformers import DynamicCache

from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.pipeline import convert
from mha2mla_vlm.model.cache.latent import LatentCache
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.utils.compat import enable_checkpointing

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
BATCH = ["image", "text", "two images"]


def reference_logits(model, inputs, *, all_text=False):
    """Logits with every attention layer replaced by the reference."""
    model = copy.deepcopy(model)
    visual = torch.isin(inputs["input_ids"], torch.tensor(model.visual_token_ids))
    visual = torch.zeros_like(visual) if all_text else visual
    for layer in decoder_layers(model):
        layer.self_attn = ReferenceAttention(layer.self_attn, visual, inputs["attention_mask"])
    return whole_logits(model, inputs)


@pytest.fixture(scope="module")
def converted_whole():
    """Per family, an original and its conversion that drops nothing."""
    made = {}

    def make(family):
        if family not in made:
            model, processor = original(family)
            records = answered(family, 3, ["two images"])
            config = ConversionConfig(qk_rope_head_dim=64, d_kv=64)
            made[family] = model, convert(model, processor, records, config), processor
        return made[family]

    return make


@pytest.mark.parametrize("prompts", [["image"], ["two images"], ["text"], BATCH], ids=str)
def test_all_pairs_and_full_rank_reproduce_the_original(converted_whole, family, prompts):
    model, converted, processor = converted_whole(family)
    inputs = prompt_inputs(family, processor, prompts)
    expected = real_tokens(whole_logits(model, inputs), inputs)
    torch.testing.assert_close(real_tokens(whole_logits(converted, inputs), inputs), expected, **CLOSE)


@pytest.mark.parametrize("prompts", [[name] for name in PROMPTS] + [BATCH], ids=str)
def test_expanded_path_is_the_reference(mla, family, prompts):
    model, processor = mla(family)
    layers = decoder_layers(model)
    del layers[1:]  # the reference is slow, and one layer shows it
    model.config.get_text_config().num_hidden_layers = 1
    inputs = prompt_inputs(family, processor, prompts)
    got = real_tokens(whole_logits(model, inputs), inputs)
    torch.testing.assert_close(got, real_tokens(reference_logits(model, inputs), inputs), **CLOSE)
    if inputs.get("pixel_values") is not None:  # the comparison must be able to see a wrong modality
        wrong = real_tokens(reference_logits(model, inputs, all_text=True), inputs)
        assert (got - wrong).abs().max() > 1e-2


@pytest.mark.long
@pytest.mark.parametrize("path", ["absorbed", "expanded", "chunked"])
@pytest.mark.parametrize("cache", [LatentCache, DynamicCache])
@pytest.mark.parametrize("prompt", list(PROMPTS))
def test_cached_is_uncached(mla, family, prompt, cache, path):
    model, processor = mla(family)
    inputs = prompt_inputs(family, processor, [prompt])
    expected = whole_logits(model, inputs)
    limits = {
        "absorbed": {"absorb_limit": 10**6},
        "expanded": {"absorb_limit": 0},
        "chunked": {"absorb_limit": 0, "expand_chunk": 5},
    }[path]
    set_attention(model, **limits)
    for cuts in piece_cuts(model, inputs):
        got = piecewise_logits(model, inputs, cuts, cache())
        torch.testing.assert_close(got, expected, **CLOSE)


def piece_cuts(model, inputs):
    """Ends of pieces: the last tokens one by one, and the second image as a piece over a filled cache."""
    ids = inputs["input_ids"][0]
    total = len(ids)
    yield list(range(total - 4, total))
    places = (ids == model.config.image_token_id).nonzero()[:, 0].tolist()
    gaps = [b for a, b in itertools.pairwise(places) if b > a + 3]
    if places:
        yield [(gaps[-1] if gaps else places[0]) - 1]


def test_all_text_cache_is_seen_as_wrong(mla, family):
    """Negative control of the cached paths: factors of text for all tokens must change the logits."""
    model, processor = mla(family)
    inputs = prompt_inputs(family, processor, ["image"])
    right = piecewise_logits(model, inputs, [inputs["input_ids"].shape[1] - 1], LatentCache())
    for layer in decoder_layers(model):
        layer.self_attn.kv_b_proj["vision"] = layer.self_attn.kv_b_proj["text"]
    wrong = piecewise_logits(model, inputs, [inputs["input_ids"].shape[1] - 1], LatentCache())
    assert (right - wrong).abs().max() > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_is_single(mla, family, side):
    model, processor = mla(family)
    batch = prompt_inputs(family, processor, BATCH, side=side)
    together = whole_logits(model, batch)
    for row, prompt in enumerate(BATCH):
        rec = record(family, prompt, row)
        text = processor.apply_chat_template(rec.messages, tokenize=False, add_generation_prompt=True)
        single = dict(
            processor(text=[text], images=rec.images or None, add_special_tokens=False, return_tensors="pt")
        )
        mine = together[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(mine, whole_logits(model, single)[0], **CLOSE)


@pytest.mark.parametrize("shared", [("shared",), ("text", "vision")])
def test_sdpa_is_eager(mla, family, shared):
    model, processor = mla(family, modalities=shared)
    inputs = prompt_inputs(family, processor, BATCH)
    model.set_attn_implementation("sdpa")
    expected = real_tokens(whole_logits(model, inputs), inputs)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(real_tokens(whole_logits(model, inputs), inputs), expected, **CLOSE)


def test_unfactorised_keys_and_values_are_cached_right(family):
    model, processor = random_mla(family, rank=None, modalities=("shared",))
    inputs = prompt_inputs(family, processor, ["two images"])
    expected = whole_logits(model, inputs)
    for cuts in piece_cuts(model, inputs):
        torch.testing.assert_close(piecewise_logits(model, inputs, cuts, LatentCache()), expected, **CLOSE)


def test_layers_may_differ_in_size(family):
    sizes = {"rope_dim": [8, 16, 32, 64], "rank": [16, 24, 32, 40]}
    model, processor = random_mla_by_layer(family, **sizes)
    inputs = prompt_inputs(family, processor, ["two images"])
    cache = LatentCache()
    total = inputs["input_ids"].shape[1]
    got = piecewise_logits(model, inputs, list(range(total - 3, total)), cache)
    torch.testing.assert_close(got, whole_logits(model, inputs), **CLOSE)
    assert [layer.keys.shape[-1] for layer in cache.layers] == sizes["rank"]
    assert [layer.values.shape[-1] for layer in cache.layers] == sizes["rope_dim"]


def random_mla_by_layer(family, *, rope_dim, rank):
    """`random_mla` with sizes by layer; only the pairs are left in order."""
    from mha2mla_vlm.model.modeling import mla_classes

    base, processor = original(family)
    config_class, model_class = mla_classes(family)
    mla = {"qk_rope_head_dim": rope_dim, "kv_lora_rank": rank, "modalities": ("text", "vision")}
    torch.manual_seed(3)
    values = base.config.to_dict() | {"model_type": config_class.model_type, "mla": mla}
    return model_class(config_class(**values)).eval(), processor


def test_gradients_reach_every_factor(mla, family):
    model, processor = mla(family)
    model.train()
    enable_checkpointing(model)
    inputs = prompt_inputs(family, processor, ["image"])
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    for layer in decoder_layers(model):
        for name, parameter in layer.self_attn.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_training_the_conversion_leaves_the_original_alone(converted_whole, family):
    model, converted, _ = converted_whole(family)
    mine = {parameter.data_ptr() for parameter in model.parameters()}
    assert not mine & {parameter.data_ptr() for parameter in converted.parameters()}
    assert converted.generation_config is not model.generation_config
