"""`generate` on converted models over each kind of transformers' caches."""

import pytest
import torch
from helpers import generate, greedy, prompt_inputs, set_attention, with_positions
from transformers import DynamicCache, StaticCache
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.cache.latent import LatentCache, bytes_per_token, cache_bytes
from mha2mla_vlm.utils.compat import cache_argument, cache_of

BATCH = ["image", "text", "two images"]
ROOM = 256


def quantised(backend, installed):
    """transformers' quantised cache of a library, where that is installed."""
    how = {"cache_config": {"backend": backend, "nbits": 4, "q_group_size": 8}}
    mark = pytest.mark.skipif(not installed, reason=f"{backend} is not installed")
    return pytest.param({"cache_implementation": "quantized"} | how, marks=mark)


@pytest.mark.parametrize(
    "how",
    [
        {"cache_implementation": "dynamic"},
        pytest.param(
            {"cache_implementation": "offloaded"},
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading needs a GPU"),
        ),
        quantised("hqq", is_hqq_available()),
        quantised("quanto", is_optimum_quanto_available()),
    ],
    ids=lambda how: "-".join(map(str, how.values())),
)
def test_other_caches_run(mla, family, how):
    model, processor = mla(family, rank=48)  # whose halves are cached at read
    inputs = prompt_inputs(family, processor, ["image"])
    got = generate(model, inputs, **how)
    assert got.shape == (1, 6)
    if how["cache_implementation"] != "quantized":
        assert torch.equal(got, generate(model, inputs))


@pytest.mark.long
@pytest.mark.parametrize("prompts", [["two images"], BATCH], ids=str)
@pytest.mark.parametrize("limit", [0, 10**6], ids=["expanded", "absorbed"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=str)
def test_a_cache_of_eight_bits_gives_the_same_tokens(mla, family, prompts, limit, how):
    model, processor = mla(family)
    set_attention(model, absorb_limit=limit, expand_chunk=5)
    inputs = prompt_inputs(family, processor, prompts)
    config = {"nbits": 8, "q_group_size": 4, "residual_length": 4}
    got = generate(model, inputs, cache_implementation="quantized", cache_config=config, **how)
    assert torch.equal(got, generate(model, inputs, **how))


def test_assisted_decoding_crops_a_quantized_cache(mla, family):
    model, processor = mla(family)
    inputs = prompt_inputs(family, processor, ["image"])
    config = {"nbits": 8, "q_group_size": 2, "residual_length": 2}
    how = {"cache_implementation": "quantized", "cache_config": config}
    expected = generate(model, inputs)
    assert torch.equal(generate(model, inputs, prompt_lookup_num_tokens=3, **how), expected)


def test_a_quantized_cache_holds_few_bytes(mla, family):
    model, processor = mla(family, rope_dim=16, rank=40)
    inputs = prompt_inputs(family, processor, ["two images"])
    how = {"cache_implementation": "quantized", "return_dict_in_generate": True, "max_new_tokens": 4}
    sizes = {}
    for bits in (8, 4, 2):
        cache = cache_of(model.generate(**inputs, **how, cache_config={"nbits": bits, "q_group_size": 16}))
        sizes[bits] = cache_bytes(cache) / cache.get_seq_length()
    plain = bytes_per_token(model.config, itemsize=4)
    assert sizes[2] < sizes[4] < sizes[8] < plain


def test_unknown_quantization_is_refused(mla, family):
    model, processor = mla(family)
    inputs = prompt_inputs(family, processor, ["text"])
    with pytest.raises(InputError, match="nbits is 3"):
        generate(model, inputs, cache_implementation="quantized", cache_config={"nbits": 3})


def test_plain_dynamic_cache_holds_latents_too(mla, family):
    model, processor = mla(family)
    inputs = prompt_inputs(family, processor, BATCH)
    cache = DynamicCache()
    assert torch.equal(generate(model, inputs, **cache_argument(cache)), generate(model, inputs))
    assert cache_bytes(cache) == len(BATCH) * cache.get_seq_length() * bytes_per_token(
        model.config, itemsize=4
    )


@pytest.mark.parametrize("limit", [0, 10**6], ids=["expanded", "absorbed"])
@pytest.mark.parametrize("prompts", [["text"], ["two images"], BATCH], ids=str)
def test_a_static_cache_gives_the_same_tokens(mla, family, prompts, limit):
    model, processor = mla(family)
    inputs = prompt_inputs(family, processor, prompts)
    expected = generate(set_attention(model, absorb_limit=limit), inputs)
    how = greedy(model, cache_implementation="static", return_dict_in_generate=True)
    output = model.generate(**inputs, **how)
    assert torch.equal(output.sequences[:, inputs["input_ids"].shape[1] :], expected)
    room = cache_of(output).layers[0].max_cache_len
    assert cache_bytes(cache_of(output)) == bytes_per_token(model.config, itemsize=4) * room * len(prompts)


def test_a_static_cache_serves_beams_and_a_second_prompt(mla, family):
    model, processor = mla(family)
    inputs = prompt_inputs(family, processor, ["image", "text"])
    expected = generate(model, inputs, num_beams=3)
    assert torch.equal(generate(model, inputs, num_beams=3, cache_implementation="static"), expected)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=ROOM)
    for prompts in (["image", "text"], ["text", "two turns"]):
        inputs = prompt_inputs(family, processor, prompts)
        cache.reset()
        got = generate(model, inputs, **cache_argument(cache))
        assert torch.equal(got, generate(model, inputs))


@pytest.mark.long
@pytest.mark.parametrize("shared", [("shared",), ("text", "vision")])
def test_decoding_compiles_once_for_all_tokens_and_prompts(mla, family, shared):
    model, processor = mla(family, modalities=shared)
    torch._dynamo.reset()
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=ROOM)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for prompt in ("image", "two images"):
            inputs = prompt_inputs(family, processor, [prompt])
            if torch.__version__.startswith("2.9."):  # it compiles anew for another cache, originals too
                cache.reset()
            else:
                cache = StaticCache(config=model.config.get_text_config(), max_cache_len=ROOM)
            expected = generate(model, inputs)[0]
            token = model(**inputs, **cache_argument(cache), use_cache=True).logits[0, -1]
            mask = torch.zeros(1, ROOM, dtype=torch.long)
            mask[:, : inputs["input_ids"].shape[1]] = 1
            positions = with_positions(model, inputs)["position_ids"][..., -1:]
            for wanted in expected:
                token[list(model.visual_token_ids)] = -torch.inf
                assert token.argmax() == wanted
                positions = positions + 1
                mask[:, int(mask.sum())] = 1
                token = step(
                    input_ids=token.argmax()[None, None],
                    attention_mask=mask,
                    position_ids=positions,
                    **cache_argument(cache),
                    use_cache=True,
                ).logits[0, -1]


def test_foreign_cache_is_refused(mla, family):
    model, processor = mla(family)
    inputs = prompt_inputs(family, processor, ["text"])
    cache = DynamicCache()
    model(**inputs, **cache_argument(cache), use_cache=True)
    cache.layers[0].token_modality = None  # as if another model had filled it
    with pytest.raises(InputError, match="unknown modality"):
        model(input_ids=inputs["input_ids"][:, -1:], **cache_argument(cache), use_cache=True)


def test_static_cache_of_keys_and_values_is_refused(mla, family):
    model, processor = mla(family)
    inputs = prompt_inputs(family, processor, ["text"])
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    cache.early_initialization(1, 2, 64, torch.float32, torch.device("cpu"))
    with pytest.raises(InputError, match="static"):
        model(**inputs, **cache_argument(cache), use_cache=True)


def test_unknown_cache_is_refused(mla, family):
    model, processor = mla(family)
    inputs = prompt_inputs(family, processor, ["text"])
    with pytest.raises((InputError, ValueError), match="no_such_cache"):
        generate(model, inputs, cache_implementation="no_such_cache")


def test_a_cache_may_leave_inference_mode(mla, family):
    model, processor = mla(family)
    inputs = prompt_inputs(family, processor, ["text"])
    token = inputs["input_ids"][:, -1:]
    logits = []
    for first in (torch.inference_mode, torch.no_grad):
        cache = LatentCache()
        with first():
            model(**inputs, **cache_argument(cache), use_cache=True)
            model(input_ids=token, **cache_argument(cache), use_cache=True)
        with torch.no_grad():
            logits.append(model(input_ids=token, **cache_argument(cache), use_cache=True).logits)
    assert torch.equal(*logits)
