"""vLLM answers as `generate` does, in a cache that is as much smaller as its rows are."""

import contextlib

import pytest
import torch
from conftest import as_on_the_hub, engine
from helpers import original, random_mla, record, with_partial_rope
from transformers.video_utils import VideoMetadata

from mha2mla_vlm.algorithms.pair_selection import high
from mha2mla_vlm.algorithms.pair_selection.base import RopeSelection
from mha2mla_vlm.config import MLAConfig
from mha2mla_vlm.data.records import Record, encode, message_text
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.evaluation.answers import evaluate
from mha2mla_vlm.model.cache.latent import bytes_per_token
from mha2mla_vlm.model.checkpoint import load, load_config, load_processor, save
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.model.shipped import ZOO_NAMES
from mha2mla_vlm.zoo.chats import zoo_records

SLOW = ("qwen2_vl", "internvl", "internvl-llama", "llava_onevision", "mistral3", "smolvlm")
OTHERS = [
    "qwen3_vl_moe",
    "internvl-qwen3",
    "idefics3",
    *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW),
]
MIXED = ("write", "read", "read", "write")
pytestmark = pytest.mark.vllm
NEW = 8
LONG = "Say again: " + "the digit 7 is in row 1, column 2. " * 40


def requests(name):
    """Twenty chats: of no, one and two images, short and long, the first few asked twice."""
    kinds = ["text", "image", "two images", "two turns"]
    chats = [record(name, kinds[i % 4], seed=i) for i in range(13)]
    for i, (question, count) in enumerate([(LONG, 0), (LONG, 1), (LONG[:300], 1)]):
        parts = [{"type": "image"}] * count + [{"type": "text", "text": question}]
        images = record(name, "image", seed=20 + i).images[:count]
        chats.append(Record(messages=[{"role": "user", "content": parts}], images=images))
    return [*chats, *chats[1:5]]


def prompts(processor, chats):
    """What `LLM.generate` takes."""
    asked = []
    for chat in chats:
        text = processor.apply_chat_template(chat.messages, tokenize=False, add_generation_prompt=True)
        images = {"multi_modal_data": {"image": chat.load_images()}} if chat.images else {}
        asked.append({"prompt": text, **images})
    return asked


def visual_ids(config):
    """Tokens that are not to be answered with: after them vLLM sees an image where `generate` sees text."""
    return list(get_family(config.model_type).visual_token_ids(config))


def served(llm, asked):
    """Tokens of each answer and their log-probabilities."""
    from vllm import SamplingParams

    banned = dict.fromkeys(visual_ids(llm.llm_engine.vllm_config.model_config.hf_config), -100.0)
    options = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=1, logit_bias=banned)
    found = []
    for request in llm.generate(asked, options, use_tqdm=False):
        answer = request.outputs[0]
        logs = [step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs, strict=True)]
        found.append((list(answer.token_ids), logs))
    return found


@torch.no_grad()
def generated(model, inputs):
    """The same from `generate`."""
    model.generation_config.eos_token_id = None
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    banned = visual_ids(model.config)
    out = model.generate(**inputs, max_new_tokens=NEW, suppress_tokens=banned, **options)
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    logs = [step[0].log_softmax(-1)[token].item() for token, step in zip(tokens, out.logits, strict=True)]
    return tokens, logs


def expected(folder, chats):
    model, processor = load(folder, dtype=torch.float32), load_processor(folder)
    return [generated(model, encode(processor, [chat], generation_prompt=True)) for chat in chats]


def assert_same(found, right):
    assert len(found) == len(right)
    for (tokens, logs), (right_tokens, right_logs) in zip(found, right, strict=True):
        assert tokens == right_tokens
        assert logs == pytest.approx(right_logs, abs=1e-4)


@contextlib.contextmanager
def checked(folder, name, most_images=2, **options):
    """Asks all chats at once, and all once more, which finds their prefixes cached; gives the engine, what
    was asked, and the answers.
    """
    chats = [chat for chat in requests(name) if len(chat.images) <= most_images]
    asked, right = prompts(load_processor(folder), chats), expected(folder, chats)
    lengths = []
    with engine(folder, max_num_batched_tokens=128, enable_chunked_prefill=True, **options) as llm:
        assert_same(served(llm, asked), right)
        assert_same(served(llm, asked), right)
        for request in llm.generate(asked, use_tqdm=False):
            lengths.append((len(request.prompt_token_ids), request.num_cached_tokens))
        assert max(length for length, _ in lengths) > 550
        assert sum(cached for _, cached in lengths) > 0
        yield llm, asked, right


def check(folder, name, **options):
    """Checks; returns the right answers."""
    with checked(folder, name, **options) as (_, _, right):
        return right


def test_random_models_of_low_rank(family, random_folder):
    folder = random_folder(family)
    right = check(folder, family)
    model = load(folder, dtype=torch.float32)  # negative control: all tokens as text must differ
    model.model.visual_token_ids = (-1,)
    chat = encode(load_processor(folder), [requests(family)[1]], generation_prompt=True)
    tokens, logs = generated(model, chat)
    assert tokens != right[1][0] or logs != pytest.approx(right[1][1], abs=1e-2)


def test_normed_queries_and_keys(random_folder):
    check(random_folder("qwen3_vl", rotate_at=MIXED), "qwen3_vl")


@pytest.mark.parametrize("name", OTHERS)
def test_families_that_the_zoo_does_not_have(name, tmp_path):
    sizes = {"rope_dim": [8, 4], "rank": [24, 16], "rotate_at": ["write", "read"]}
    model, processor = random_mla(name, **sizes)
    # of several images transformers gives LLaVA-OneVision each as it is, vLLM each in parts
    most = 1 if name == "llava_onevision" else 2
    check(save(model, processor, tmp_path / "model"), name, most_images=most)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_keys_rotated_at_read(name, random_folder, monkeypatch):
    folder = random_folder(name, rotate_at=("read",) * 4)
    with checked(folder, name) as (llm, asked, right):
        per_token = bytes_per_token(load_config(folder), itemsize=4)
        assert room(llm) == pytest.approx((64 << 20) / per_token, rel=0.02)  # whole pages
        backend = pytest.importorskip("mha2mla_vlm.serving.vllm.backend")
        stored = backend.read_positions  # negative control: keys rotated by other positions must differ
        monkeypatch.setattr(backend, "read_positions", lambda *given: stored(*given) // 2)
        (tokens, logs), *_ = served(llm, asked[:1])
    assert tokens != right[0][0] or logs != pytest.approx(right[0][1], abs=1e-2)


def test_one_factor_for_all_tokens(random_folder):
    check(random_folder("llava", ("shared",)), "llava")


def test_channels_of_different_bits(tmp_path):
    """What is rounded may fall in another step where sums end otherwise, seldom and with little effect."""
    model, processor = random_mla("qwen2_5_vl", rotate_at=list(MIXED), bits=(4, 12, 8, 8))
    folder = save(model, processor, tmp_path / "model")
    chats = requests("qwen2_5_vl")
    asked, right = prompts(processor, chats), expected(folder, chats)
    with engine(folder, max_num_batched_tokens=128, enable_chunked_prefill=True) as llm:
        for found in (served(llm, asked), served(llm, asked)):  # the second finds prefixes cached
            same = [
                a == b and pytest.approx(c, abs=1e-4) == d
                for (a, c), (b, d) in zip(found, right, strict=True)
            ]
            assert sum(same) > 0.6 * len(same)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_layers_left_as_they_were(name, tmp_path):
    sizes = {"rope_dim": [None, 16, None, 8], "rank": [None, 40, None, 24]}
    model, processor = random_mla(name, rotate_at=["write", "write", "write", "read"], **sizes)
    check(save(model, processor, tmp_path / "mixed"), name)


def test_compiled(random_folder):
    check(random_folder("qwen2_5_vl", rotate_at=MIXED), "qwen2_5_vl", enforce_eager=False)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen2_5_vl", {"tensor_parallel_size": 2}),
        ("qwen2_5_vl", {"pipeline_parallel_size": 2, "enforce_eager": False}),
        pytest.param("qwen3_vl", {"tensor_parallel_size": 2, "enforce_eager": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_processes(name, options, random_folder, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    check(random_folder(name, rotate_at=MIXED), name, **options)


@pytest.mark.parametrize("name", sorted(ZOO_NAMES))
def test_zoo_models(name, converted):
    check(converted(name), name)


def test_video(random_folder):
    folder = random_folder("qwen2_5_vl")
    model, processor = load(folder, dtype=torch.float32), load_processor(folder)
    page = record("qwen2_5_vl", "image").load_images()[0]
    frames = torch.stack([torch.tensor(list(page.getdata())).view(page.height, page.width, 3)] * 4)
    frames = frames.to(torch.uint8) + torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1) * 10
    parts = [{"type": "video"}, {"type": "text", "text": "How many digits are 7?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    # after a video that lasts longer than it is large, vLLM continues at other positions than transformers
    known = {"total_num_frames": 4, "fps": 4.0, "duration": 1.0, "frames_indices": [0, 1, 2, 3]}
    inputs = processor(
        text=[text],
        videos=[frames.permute(0, 3, 1, 2)],
        video_metadata=[VideoMetadata(**known)],
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert (inputs["input_ids"] == model.config.video_token_id).sum() > 4
    video = (frames.numpy(), {**known, "do_sample_frames": False})
    with engine(folder) as llm:
        assert_same(
            served(llm, [{"prompt": text, "multi_modal_data": {"video": [video]}}]),
            [generated(model, inputs)],
        )


def room(llm):
    """Tokens that an engine's cache of 64 MB has room for."""
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks * cache.block_size


def capacity(folder):
    """The same of a folder's engine."""
    with engine(folder) as llm:
        return room(llm)


@pytest.mark.parametrize("name", sorted(ZOO_NAMES))
def test_capacity_rises_by_the_ratio_of_bytes(name, converted, tmp_path):
    small, whole = converted(name), as_on_the_hub(name, tmp_path / "whole")
    per_token = [bytes_per_token(load_config(folder)) for folder in (whole, small)]
    found = capacity(small) / capacity(whole)
    assert found == pytest.approx(per_token[0] / per_token[1], rel=0.02)  # whole pages


@pytest.mark.parametrize("way", [("write",), ("read",), ("write", "mixed"), ("read", "mixed")], ids="-".join)
def test_bfloat16_answers_as_well(way, converted):
    """Digits read in bfloat16, by the CPU kernel where there is one, are those of our evaluation."""
    from vllm import SamplingParams

    folder = converted("qwen2_5_vl", *way)
    chats = zoo_records("qwen2_5_vl", split="test", samples=12, seed=3)
    processor = load_processor(folder)
    places = [(chat, index) for chat in chats for index in chat.answers()]
    asked = [chat.before(index) for chat, index in places]
    wanted = [message_text(chat.messages[index]).strip() for chat, index in places]
    with engine(folder, dtype="bfloat16") as llm:
        options = SamplingParams(temperature=0, max_tokens=24)
        answers = llm.generate(prompts(processor, asked), options, use_tqdm=False)
        found = room(llm)
    mla = load_config(folder).mla
    most = 2 * 4 if mla["latent_bits"] else 0  # bytes in each layer: the modality, and whole numbers
    assert found >= 0.98 * (64 << 20) / (bytes_per_token(load_config(folder)) + most)
    right = [one.outputs[0].text.strip() == text for one, text in zip(answers, wanted, strict=True)]
    ours = evaluate(load(folder, dtype=torch.bfloat16), processor, chats)["exact_match"]
    assert sum(right) / len(right) == pytest.approx(ours, abs=0.1)
    assert ours > 0.7


def test_what_is_not_factorised_is_refused(tmp_path):
    model, processor = original("llava")
    attention = decoder_layers(model)[0].self_attn
    kv_heads = attention.config.num_key_value_heads
    pairs = high.pairs(attention.head_dim // 2, 8).repeat(kv_heads, 1)
    chosen = [RopeSelection(pairs=pairs.clone()) for _ in decoder_layers(model)]
    partial = with_partial_rope(model, chosen, MLAConfig(qk_rope_head_dim=16))
    save(partial, processor, tmp_path / "partial")
    with pytest.raises(InputError, match="not factorised"), engine(tmp_path / "partial"):
        pass


def test_a_cache_of_another_dtype_is_refused(random_folder):
    folder = random_folder("llava")
    with pytest.raises(InputError, match="kv_cache_dtype"), engine(folder, kv_cache_dtype="fp8"):
        pass
