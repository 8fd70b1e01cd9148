"""`generate` on converted models: the cache really shrinks, and every way of decoding agrees."""

import pytest
import torch
from helpers import original, prompt_inputs, random_mla, record, set_attention, with_positions
from transformers import DynamicCache, StaticCache, pipeline
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from mha2mla_vlm.config import AttentionSizes
from mha2mla_vlm.data.records import encode
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.cache.latent import LatentCache, LatentLayer, bytes_per_token, cache_bytes
from mha2mla_vlm.model.modeling import text_model
from mha2mla_vlm.utils.compat import cache_argument, cache_of

BATCH = ["image", "text", "two images"]
NEW = 6
ROOM = 256


def generate(model, inputs, **kwargs):
    """Greedy tokens, without the prompt; visual tokens are never generated."""
    banned = list(model.visual_token_ids)
    output = model.generate(
        **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, suppress_tokens=banned, **kwargs
    )
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    return sequences[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("prompts", [["image"], ["text"], ["two images"], BATCH], ids=str)
@pytest.mark.parametrize("limit", [0, 10**6], ids=["expanded", "absorbed"])
def test_cached_tokens_are_uncached_tokens(mla, family, prompts, limit):
    model, processor = mla(family)
    inputs = prompt_inputs(family, processor, prompts)
    expected = generate(model, inputs, use_cache=False)
    assert torch.equal(generate(set_attention(model, absorb_limit=limit), inputs), expected)


@pytest.mark.parametrize(("rotate_at", "share"), [("write", 0.375), ("read", 0.125)])
def test_default_cache_holds_the_bytes_of_the_formula(family, rotate_at, share):
    base, processor = original(family)
    rank = 16 * base.config.text_config.num_key_value_heads
    model, _ = random_mla(family, rope_dim=32, rank=rank, rotate_at=rotate_at)
    base.visual_token_ids = model.visual_token_ids
    inputs = prompt_inputs(family, processor, ["two images"])
    sizes = {}
    for name, candidate in (("original", base), ("converted", model)):
        output = candidate.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
        cache = cache_of(output)
        itemsize = cache.layers[0].keys.element_size()
        expected = bytes_per_token(candidate.config, itemsize=itemsize) * cache.get_seq_length()
        assert cache_bytes(cache) == expected
        sizes[name] = cache_bytes(cache) / cache.get_seq_length()
    assert isinstance(cache, LatentCache)
    assert all(isinstance(layer, LatentLayer) for layer in cache.layers)
    positions = 4 * AttentionSizes.of(base.config).position_axes if rotate_at == "read" else 0
    assert sizes["converted"] == share * sizes["original"] + positions


def test_left_padded_batch_generates_as_single(mla, family):
    model, processor = mla(family)
    together = generate(model, prompt_inputs(family, processor, BATCH))
    for row, prompt in enumerate(BATCH):
        single = dict(encode(processor, [record(family, prompt, row)], generation_prompt=True))
        assert torch.equal(generate(model, single)[0], together[row]), prompt


@pytest.mark.parametrize("prompts", [["image"], BATCH], ids=str)
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_beam_search_gives_the_tokens_of_the_expanded_path(mla, family, prompts, how):
    model, processor = mla(family)
    inputs = prompt_inputs(family, processor, prompts)
    expected = generate(set_attention(model, absorb_limit=0), inputs, **cache_argument(DynamicCache()), **how)
    assert len(expected) == len(prompts) * how.get("num_return_sequences", 1)
    assert torch.equal(generate(set_attention(model, absorb_limit=10**6), inputs, **how), expected)


def test_assisted_decoding_gives_the_tokens_of_plain_decoding(mla, family):
    model, processor = mla(family)
    assistant, _ = mla(family)
    with torch.no_grad():  # close enough to agree at times, far enough to be cropped at others
        for parameter in assistant.lm_head.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    inputs = prompt_inputs(family, processor, ["image"])
    expected = generate(set_attention(model, absorb_limit=0), inputs)
    set_attention(model, absorb_limit=10**6)
    assert torch.equal(generate(model, inputs, assistant_model=assistant), expected)
    assert torch.equal(generate(model, inputs, prompt_lookup_num_tokens=3), expected)


def test_several_samples_per_prompt(mla, family):
    model, processor = mla(family)
    # one image a row at most: transformers 5.16 repeats images, not rows of images
    inputs = prompt_inputs(family, processor, ["image", "text", "image"])
    output = model.generate(
        **inputs,
        do_sample=True,
        top_k=1,
        num_return_sequences=2,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        suppress_tokens=list(model.visual_token_ids),
    )
    expected = generate(model, inputs)
    assert torch.equal(output[:, inputs["input_ids"].shape[1] :], expected.repeat_interleave(2, dim=0))


@pytest.mark.parametrize("limit", [0, 10**6], ids=["expanded", "absorbed"])
def test_second_turn_with_an_image_over_the_cache_is_the_whole_chat(mla, family, limit):
    model, processor = mla(family)
    set_attention(model, absorb_limit=limit, expand_chunk=5)
    chat = record(family, "two images")
    first = dict(encode(processor, [chat.before(1)], generation_prompt=True))
    cache = LatentCache()
    model.generate(**first, **cache_argument(cache), max_new_tokens=1)
    whole = dict(encode(processor, [chat], generation_prompt=True))
    length = cache.get_seq_length()
    assert torch.equal(whole["input_ids"][:, :length], first["input_ids"])
    second = only_second_image(model, whole)
    expected = generate(model, whole)
    assert torch.equal(generate(model, second, **cache_argument(cache)), expected)


def only_second_image(model, inputs):
    """Inputs of a second turn over a cache: all tokens, but pixels of the new image alone."""
    if "image_grid_thw" in inputs:  # transformers finds multimodal positions from the grids of all images
        inputs = with_positions(model, inputs)
        inputs["pixel_values"] = inputs["pixel_values"][int(inputs["image_grid_thw"][0].prod()) :]
        inputs["image_grid_thw"] = inputs["image_grid_thw"][1:]
        return inputs
    return inputs | {key: inputs[key][1:] for key in ("pixel_values", "image_sizes") if key in inputs}


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
    assert got.shape == (1, NEW)
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
    output = model.generate(
        **inputs,
        cache_implementation="static",
        return_dict_in_generate=True,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        suppress_tokens=list(model.visual_token_ids),
    )
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


def test_unknown_decode_backend_is_refused(mla, family):
    model, processor = mla(family)
    inputs = prompt_inputs(family, processor, ["text"])
    with pytest.raises(InputError, match="decode_backend is 'cuda'"):
        generate(set_attention(model, decode_backend="cuda"), inputs)


def test_embeddings_alone_need_token_types(mla, family):
    model, processor = mla(family)
    inputs = prompt_inputs(family, processor, ["text"])
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(InputError, match="mm_token_type_ids"):
        model(inputs_embeds=embeddings)
    types = torch.zeros_like(inputs["input_ids"])
    got = model(inputs_embeds=embeddings, mm_token_type_ids=types).logits
    torch.testing.assert_close(got, model(input_ids=inputs["input_ids"]).logits)


def test_foreign_cache_is_refused(mla, family):
    model, processor = mla(family)
    inputs = prompt_inputs(family, processor, ["text"])
    cache = DynamicCache()
    model(**inputs, **cache_argument(cache), use_cache=True)
    cache.layers[0].token_modality = None  # as if another model had filled it
    with pytest.raises(InputError, match="unknown modality"):
        model(input_ids=inputs["input_ids"][:, -1:], **cache_argument(cache), use_cache=True)


def test_pipeline_answers(mla, family, tmp_path):
    model, processor = mla(family)
    image = record(family, "image").images[0]
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": image}, {"type": "text", "text": "Read all digits."}],
        }
    ]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    answer = pipe(text=chat, max_new_tokens=3, return_full_text=False)[0]["generated_text"]
    assert isinstance(answer, str)


def test_video_tokens_are_visual_and_decode_alike():
    model, processor = random_mla("qwen2_5_vl")
    frames = torch.randint(
        0, 256, (4, 3, 24, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    content = [{"type": "video"}, {"type": "text", "text": "Read all digits."}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = dict(processor(text=[text], videos=[frames], do_sample_frames=False, return_tensors="pt"))
    ids = inputs["input_ids"]
    video = ids == model.config.video_token_id
    assert int(video.sum()) == int(inputs["video_grid_thw"].prod()) // 4
    output = model(**inputs, use_cache=True)
    seen = cache_of(output).token_modality.mask
    marks = [model.config.vision_start_token_id, model.config.vision_end_token_id]
    assert torch.equal(seen, video | torch.isin(ids, torch.tensor(marks)))
    expected = generate(model, inputs, use_cache=False)
    assert torch.equal(generate(set_attention(model, absorb_limit=10**6), inputs), expected)


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


def test_continuous_batching_is_refused(mla, family):
    """It pages keys and values, and answered with nothing."""
    model, processor = mla(family)
    ids = prompt_inputs(family, processor, ["text"])["input_ids"]
    with pytest.raises(InputError, match="vllm serve"):
        model.generate(input_ids=ids, cache_implementation="paged", max_new_tokens=2)
    with pytest.raises(InputError, match="vllm serve"):
        model.generate_batch(ids.tolist())


def test_embeddings_with_token_types_are_the_ids(mla, family):
    """Image features in `inputs_embeds`, as captioning and prompt-tuning code passes them."""
    model, processor = mla(family)
    inputs = prompt_inputs(family, processor, ["image"])
    seen = {}
    hook = text_model(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    expected = model(**with_positions(model, inputs), use_cache=False).logits
    hook.remove()
    if seen.get("deepstack_visual_embeds") is not None:
        pytest.skip("embeddings alone are not all that the language model gets")
    types = (inputs["input_ids"] == model.config.image_token_id).long()
    positions = with_positions(model, inputs)["position_ids"]
    embeddings = seen["inputs_embeds"].detach()
    got = model(inputs_embeds=embeddings, mm_token_type_ids=types, position_ids=positions, use_cache=False)
    torch.testing.assert_close(got.logits, expected)
    output = model.generate(inputs_embeds=embeddings, mm_token_type_ids=types, max_new_tokens=2)
    assert output.shape == (1, 2)


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
