"""`generate` on converted models: the cache really shrinks, and every way of decoding agrees."""

import pytest
import torch
from helpers import (
    generate,
    greedy,
    only_second_image,
    original,
    prompt_inputs,
    random_mla,
    record,
    set_attention,
    with_positions,
)
from transformers import DynamicCache, pipeline

from mha2mla_vlm.config import AttentionSizes
from mha2mla_vlm.data.records import encode
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.cache.latent import LatentCache, LatentLayer, bytes_per_token, cache_bytes
from mha2mla_vlm.model.modeling import text_model
from mha2mla_vlm.utils.compat import cache_argument, cache_of

BATCH = ["image", "text", "two images"]


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
    output = model.generate(**inputs, **greedy(model, do_sample=True, top_k=1, num_return_sequences=2))
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
