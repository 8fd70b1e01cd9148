"""Ours against the published code, on the tiny models in `tests/fixtures/published`.

Nothing published had to be left out: with the pairs of its rank file and its statistics our
conversion gives its models. Its samples are all of one length, so it never met padding here, and
its batches of two can be fed one row at a time.
"""

import copy
import functools
from pathlib import Path

import pytest
import torch
from helpers import moments_of, with_factors, with_partial_rope
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, BatchFeature

from mha2mla_vlm.algorithms.pair_selection.base import RopeSelection
from mha2mla_vlm.config import DECOUPLED, MLAConfig
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.utils.compat import cache_argument, cache_of

FOLDER = Path(__file__).parents[1] / "fixtures" / "published"
PUBLISHED = ("qwen2_5_vl", "llava_next", "llava")  # families of the published code
HEAD_DIM, ROPE_DIM, D_KV, LAYERS = 16, 8, 4, 3
PUBLISHED_NAMES = {"text": "text", "vision": "img"}


@functools.cache
def golden(family):
    return load_file(FOLDER / family / "golden.safetensors")


@functools.cache
def base_model(family):
    folder = FOLDER / family / "base"
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def with_token_types(family, inputs):
    """Qwen2.5-VL in transformers 5 reads from these where the images are."""
    if family == "qwen2_5_vl":
        is_image = inputs["input_ids"] == base_model(family).config.image_token_id
        inputs["mm_token_type_ids"] = is_image.long()
    return inputs


def golden_inputs(family):
    inputs = {k.removeprefix("input."): v for k, v in golden(family).items() if k.startswith("input.")}
    return with_token_types(family, inputs)


def calibration_batches(family):
    """The 24 batches of two samples, one sample at a time; sizes of images are those of the inputs."""
    data = golden(family)
    batches = []
    for ids, pixels in zip(data["calib.input_ids"], data["calib.pixel_values"].float(), strict=True):
        if family == "qwen2_5_vl":
            pixels = pixels.unflatten(0, (2, -1))  # 24 patches an image, all in one list
        for row in range(2):
            batch = {"input_ids": ids[row : row + 1]}
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["labels"] = batch["input_ids"]
            batch["pixel_values"] = pixels[row] if family == "qwen2_5_vl" else pixels[row : row + 1]
            for name in ("image_sizes", "image_grid_thw"):
                if f"input.{name}" in data:
                    batch[name] = data[f"input.{name}"][row : row + 1]
            batches.append(BatchFeature(with_token_types(family, batch)))
    return batches


@functools.cache
def ranks(family):
    return torch.load(FOLDER / family / "ranks.pth", weights_only=True)


def kept_pairs(family, best=True):
    """Selections of each layer: pairs whose rank is among the first (or, to compare, the last) R/2."""
    is_kept = ranks(family)[..., : HEAD_DIM // 2] < ROPE_DIM // 2
    pairs = [(layer == best).nonzero()[:, 1].view(len(layer), -1) for layer in is_kept]
    return [RopeSelection(pairs=chosen) for chosen in pairs]


@functools.cache
def stage1(family, best=True):
    return with_partial_rope(
        base_model(family), kept_pairs(family, best), MLAConfig(qk_rope_head_dim=ROPE_DIM)
    )


@functools.cache
def stage2(family):
    model = stage1(family)
    kv_heads = ranks(family).shape[1]
    mla = MLAConfig(
        qk_rope_head_dim=ROPE_DIM,
        kv_lora_rank=D_KV * kv_heads,
        modalities=DECOUPLED,
        factorization="md-svd",
    )
    stats = moments_of(model, calibration_batches(family))
    return with_factors(model, stats, mla)


@functools.cache
def published_factors(family):
    """`{(layer, modality): (down [r, hidden], up [G * (N + D), r])}` in our row order."""
    raw = torch.load(FOLDER / family / "svd_init_rank4.pt", weights_only=True)
    made = {}
    for modality, name in PUBLISHED_NAMES.items():
        for layer in range(LAYERS):
            down, up_k, up_v = (raw[f"W_{part}_{name}"][layer] for part in ("down", "up_k", "up_v"))
            by_head = [up.unflatten(0, (ranks(family).shape[1], -1)) for up in (up_k, up_v)]
            made[layer, modality] = down, torch.cat(by_head, dim=1).flatten(0, 1)
    return made


def our_factors(model):
    made = {}
    for layer, module in enumerate(decoder_layers(model)):
        for modality in PUBLISHED_NAMES:
            projections = module.self_attn.kv_a_proj[modality], module.self_attn.kv_b_proj[modality]
            made[layer, modality] = tuple(projection.weight.detach() for projection in projections)
    return made


@torch.no_grad()
def logits(model, inputs, **kwargs):
    return model(**inputs, **kwargs).logits


def distance(ours, wanted):
    return float((ours - wanted).abs().max())


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_original_gives_the_published_logits(family):
    assert distance(logits(base_model(family), golden_inputs(family)), golden(family)["base"]) < 2e-6


@pytest.mark.parametrize("family", PUBLISHED)
def test_rank_files_rank_every_pair_of_a_head_once_and_alike_in_both_halves(family):
    first, second = ranks(family).chunk(2, dim=-1)
    assert torch.equal(first, second)
    assert torch.equal(
        first.sort(dim=-1).values, torch.arange(HEAD_DIM // 2).expand_as(first).to(first.dtype)
    )
    assert len(first) == LAYERS


@pytest.mark.parametrize("family", PUBLISHED)
def test_partial_rope_on_the_pairs_of_lowest_rank_gives_the_published_stage_1(family):
    inputs, wanted = golden_inputs(family), golden(family)["stage1"]
    assert distance(wanted, golden(family)["base"]) > 1e-2  # partial RoPE does change the model
    assert distance(logits(stage1(family), inputs), wanted) < 2e-6
    assert distance(logits(stage1(family, best=False), inputs), wanted) > 1e-2  # the ranks' direction


@pytest.mark.parametrize("family", PUBLISHED)
def test_md_svd_of_the_same_calibration_gives_the_published_products(family):
    ours, published = our_factors(stage2(family)), published_factors(family)
    assert len(ours) == len(published) == 2 * LAYERS
    for key, (down, up) in published.items():
        wanted = up @ down
        assert ours[key][0].shape == down.shape
        error = (ours[key][1] @ ours[key][0] - wanted).norm() / wanted.norm()
        assert float(error) < 5e-4, key  # theirs inverts a whitening in float32


@pytest.mark.parametrize("family", PUBLISHED)
def test_md_svd_gives_the_published_stage_2(family):
    wanted = golden(family)["stage2"]
    assert distance(wanted, golden(family)["stage1"]) > 0.1
    assert distance(logits(stage2(family), golden_inputs(family)), wanted) < 2e-4


@functools.cache
def stage2_with_published_factors(family):
    """Our model with the very factors of the published file."""
    model = copy.deepcopy(stage2(family))
    for key, weights in our_factors(model).items():
        for ours, theirs in zip(weights, published_factors(family)[key], strict=True):
            ours.copy_(theirs)
    return model


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_published_factors_in_our_model_give_the_published_stage_2_to_rounding(family):
    model = stage2_with_published_factors(family)
    assert distance(logits(model, golden_inputs(family)), golden(family)["stage2"]) < 2e-6


@pytest.mark.parametrize("family", PUBLISHED)
def test_decoding_over_our_latent_cache_gives_the_published_stage_2_to_rounding(family):
    """The published code caches keys and values at full size; from latents come the same logits."""
    model, inputs = stage2_with_published_factors(family), golden_inputs(family)
    wanted, total = golden(family)["stage2"], inputs["input_ids"].shape[1]
    by_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    prompt = {k: v[:, : total - 3] if k in by_token else v for k, v in inputs.items()}
    with torch.no_grad():
        cache = cache_of(model(**prompt, use_cache=True))
        for position in range(total - 3, total):
            new = inputs["input_ids"][:, position : position + 1]
            found = model(input_ids=new, **cache_argument(cache), use_cache=True).logits[:, -1]
            assert distance(found, wanted[:, position]) < 2e-6
    assert cache.layers[0].keys.shape[-1] == D_KV * ranks(family).shape[1]
