"""Models of which some layers are of another kind and stay: linear attention, beside gated attention."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import (
    answered,
    greedy,
    only_second_image,
    original,
    piecewise_logits,
    prompt_inputs,
    random_mla,
    real_tokens,
    record,
    run_command,
    set_attention,
    whole_logits,
)
from transformers import DynamicCache, StaticCache
from transformers.models.qwen3_5.modeling_qwen3_5 import apply_rotary_pos_emb

from mha2mla_vlm.algorithms.error_metric import attention_usage
from mha2mla_vlm.calibration.activations import calls_of
from mha2mla_vlm.calibration.statistics import Heads, layer_usage
from mha2mla_vlm.config import AttentionSizes, MLAConfig
from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.describe import describe
from mha2mla_vlm.conversion.estimate import predict
from mha2mla_vlm.conversion.on_disk import convert_checkpoint
from mha2mla_vlm.conversion.pipeline import convert
from mha2mla_vlm.conversion.work_folder import WorkFolder
from mha2mla_vlm.data.records import encode
from mha2mla_vlm.errors import InputError, Interrupted
from mha2mla_vlm.model.attention import MLAAttention
from mha2mla_vlm.model.cache.latent import LatentCache, LatentLayer, bytes_per_token, cache_bytes
from mha2mla_vlm.model.cache.quantized import QuantizationConfig, quantized_bytes_per_token, quantized_cache
from mha2mla_vlm.model.cache.state import state_bytes, state_bytes_per_row
from mha2mla_vlm.model.checkpoint import load, save
from mha2mla_vlm.model.modeling import attention_of, decoder_layers, mla_classes
from mha2mla_vlm.model.normed import keys_and_values, latent_inputs, normed_queries
from mha2mla_vlm.utils.compat import cache_argument, cache_of

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
SMALL = {"rope_dim": 8, "rank": 20}
MIXED = ["two images", "text", "image"]
slow = pytest.mark.slow


def at_full_rank(name, rotate_at):
    """An original, its conversion that loses nothing, and the processor."""
    model, processor = original(name)
    sizes = AttentionSizes.of(model.config)
    rope = sizes.rotary_dim if rotate_at == "write" else 0
    d_kv = min(sizes.most_latent_dims // sizes.kv_heads, 2 * sizes.head_dim - rope)
    config = ConversionConfig(qk_rope_head_dim=rope or None, d_kv=d_kv, rotate_at=rotate_at)
    return model, convert(model, processor, answered(name, 3), config), processor


def test_only_layers_of_full_attention_are_converted(name, rotate_at):
    model, processor = random_mla(name, **SMALL, rotate_at=rotate_at)
    kinds = [type(attention_of(layer)) for layer in decoder_layers(model)]
    assert [kind is MLAAttention for kind in kinds] == [
        kind == "full_attention" for kind in model.config.text_config.layer_types
    ]
    inputs = prompt_inputs(name, processor, MIXED)
    cache = LatentCache()
    with torch.no_grad():
        model(**inputs, **cache_argument(cache), use_cache=True)
    assert [isinstance(layer, LatentLayer) for layer in cache.layers] == [k is MLAAttention for k in kinds]
    rows, total = inputs["input_ids"].shape
    assert cache_bytes(cache) == rows * total * bytes_per_token(model.config, itemsize=4)
    most = rows * state_bytes_per_row(
        model.config, itemsize=4
    )  # a window holds its tokens but for the new one
    assert 0 < state_bytes(cache) <= most if "gemma" in name else state_bytes(cache) == most


@pytest.mark.parametrize(
    "how", ["beams", *(pytest.param(x, marks=slow) for x in ("dynamic", "static", "prefill in chunks"))]
)
def test_generated_tokens_are_those_of_the_original(name, rotate_at, how):
    model, small, processor = at_full_rank(name, rotate_at)
    inputs, given = prompt_inputs(name, processor, MIXED), greedy(small)
    if how == "beams":
        given["num_beams"] = 2
    alike = {} if "gemma4" in name else dict(given)  # whose own tokens are others in chunks
    if how == "prefill in chunks":
        given["prefill_chunk_size"] = 7
    elif how != "beams":
        given["cache_implementation"] = how
    expected = model.generate(**inputs, **alike or given)
    assert torch.equal(small.generate(**inputs, **given), expected)


@pytest.mark.parametrize("limit", [0, 10**6], ids=["expanded", "absorbed"])
@pytest.mark.parametrize(
    "make",
    ["config", "static", pytest.param(LatentCache, marks=slow), pytest.param(DynamicCache, marks=slow)],
    ids=str,
)
def test_cached_in_pieces_is_uncached(name, rotate_at, make, limit):
    model, processor = random_mla(name, **SMALL, rotate_at=rotate_at)
    set_attention(model, absorb_limit=limit)
    inputs = prompt_inputs(name, processor, ["two images"])
    expected, total = whole_logits(model, inputs), inputs["input_ids"].shape[1]
    if isinstance(make, str):
        own = {"config": model.config} if make == "config" else {"config": model.config, "max_cache_len": 256}
        cache = (DynamicCache if make == "config" else StaticCache)(**own)
    else:
        cache = make()
    visual = torch.isin(inputs["input_ids"][0], torch.tensor(model.visual_token_ids))
    first = int((~visual[total // 3 :]).nonzero()[0]) + total // 3  # not within an image, seen both ways
    got = piecewise_logits(model, inputs, [first, total - 2, total - 1], cache)
    torch.testing.assert_close(got, expected, **CLOSE)


def test_a_quantised_cache_quantises_latents_only(name, rotate_at):
    model, processor = random_mla(name, **SMALL, rotate_at=rotate_at)
    inputs = prompt_inputs(name, processor, ["two images"])
    total, bits = inputs["input_ids"].shape[1], {"nbits": 8, "q_group_size": 1, "residual_length": 1}
    cache, expected = quantized_cache(**bits), whole_logits(model, inputs)
    got = piecewise_logits(model, inputs, [total - 2, total - 1], cache)
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()
    formula = total * quantized_bytes_per_token(model.config, QuantizationConfig(**bits), itemsize=4)
    sizes = AttentionSizes.of(model.config)
    assert cache_bytes(cache) == formula + total * MLAConfig(**model.config.mla).position_bytes(sizes)
    with pytest.raises(InputError, match=r"backend 'hqq' .* but layer 0 is"):
        model.generate(
            **inputs, **greedy(model), cache_implementation="quantized", cache_config={"backend": "hqq"}
        )


def test_a_second_turn_over_the_cache_is_the_whole_chat(name, rotate_at):
    model, processor = random_mla(name, **SMALL, rotate_at=rotate_at)
    chat, cache = record(name, "two images"), LatentCache()
    first = dict(encode(processor, [chat.before(1)], generation_prompt=True))
    model.generate(**first, **cache_argument(cache), max_new_tokens=1)
    whole = dict(encode(processor, [chat], generation_prompt=True))
    expected = model.generate(**whole, **greedy(model))
    second = only_second_image(model, whole)
    assert torch.equal(model.generate(**second, **cache_argument(cache), **greedy(model)), expected)


SIZES = [
    {"budget": 0.5},
    pytest.param({"qk_rope_head_dim": 4, "d_kv": 8, "rope_selection": "mkl"}, marks=slow),
    pytest.param({"budget": 0.4, "rotate_at": "read", "latent_bits": "mixed"}, marks=slow),
    pytest.param({"budget": 0.4, "rotate_at": "auto", "max_decode_cost": 2.0}, marks=slow),
    pytest.param({"qk_rope_head_dim": 4, "d_kv": 8, "factorization": "md-svd"}, marks=slow),
    pytest.param({"qk_rope_head_dim": 8, "factorization": "none"}, marks=slow),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_checkpoint_on_disk_is_converted_as_in_memory_also_after_a_stop(name, sizes, tmp_path, monkeypatch):
    model, processor = original(name)
    folder, config = save(model, processor, tmp_path / "original"), ConversionConfig(**sizes)
    records = answered(name, 3, ["two images", "text", "image"])
    before, done = WorkFolder.finished_step, []

    def stop_once(self, **given):
        before(self, **given)
        done.append(self.done)
        if len(done) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(WorkFolder, "finished_step", stop_once)
    with pytest.raises(Interrupted):
        convert_checkpoint(folder, records, tmp_path / "small", config)
    found = convert_checkpoint(folder, records, tmp_path / "small", config, resume=True)
    assert done[3] == 4
    small, expected = load(tmp_path / "small"), convert(load(folder), processor, records, config)
    assert found.mla == small.mla_config
    assert small.mla_config == expected.mla_config
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(small.state_dict()[key], value, msg=key)
    if "budget" in sizes:
        share = bytes_per_token(small.config) / bytes_per_token(model.config)
        assert share <= sizes["budget"]
    guess = predict(folder, records, config)
    assert guess.bytes_per_token_original == bytes_per_token(model.config, itemsize=4)
    if "budget" not in sizes:
        assert guess.bytes_per_token == bytes_per_token(small.config, itemsize=4)


def test_commands_know_it(name, rotate_at, tmp_path, monkeypatch, capsys):
    for folder, made in (
        ("original", original(name)),
        ("small", random_mla(name, **SMALL, rotate_at=rotate_at)),
    ):
        save(*made, tmp_path / folder)
    own, sizes = made[0].config, AttentionSizes.of(made[0].config)
    found = describe(str(tmp_path / "small"))
    assert [rope is not None for rope in found["qk_rope_head_dim"]] == [
        index in sizes.growing for index in range(sizes.layers)
    ]
    assert [bool(pairs) for pairs in found["pairs"]] == [
        index in sizes.growing for index in range(sizes.layers)
    ]
    assert found["state_bytes_per_row"] == state_bytes_per_row(own) > 0
    assert found["bytes_per_token_original"] == 2 * len(sizes.growing) * sizes.numbers_per_token
    for command, key in (
        (["inspect", tmp_path / "small"], "state_bytes_per_row"),
        (["generate", tmp_path / "small", "--prompt", "Read.", "--max-new-tokens", 3], "text"),
    ):
        code, out, err = run_command(monkeypatch, capsys, *command)
        assert code == 0, err
        assert key in json.loads(out.splitlines()[-1]), out
    bench = ["bench", tmp_path / "small", "--baseline", tmp_path / "original", "--context", 40]
    bench += ["--batch-size", 2, "--seconds", 0, "--dtype", "float32"]
    code, out, err = run_command(monkeypatch, capsys, *bench)
    assert code == 0, err
    row = json.loads(out.splitlines()[-1])["rows"][0]
    assert row["cache_bytes"] == row["cache_bytes_formula"] == 2 * 40 * bytes_per_token(own, itemsize=4)
    assert row["cache_bytes_original"] == 2 * 40 * 2 * found["bytes_per_token_original"]


def test_it_trains(name, rotate_at):
    model, processor = random_mla(name, **SMALL, rotate_at=rotate_at)
    inputs = prompt_inputs(name, processor, ["image"])
    model.train()
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    parameters = [p for layer in model.model.language_model.layers[:2] for p in layer.parameters()]
    assert all(parameter.grad is not None for parameter in parameters if parameter.requires_grad)


def with_plain_queries(attention):
    attention.q_proj = torch.nn.Linear(attention.q_proj.in_features, attention.q_proj.out_features // 2)


def without_norms(attention):
    del attention.q_norm, attention.k_norm


@pytest.mark.parametrize("change", [with_plain_queries, without_norms])
def test_attention_without_its_gate_or_norms_is_refused(change):
    model, processor = original("qwen3_5")
    change(decoder_layers(model)[1].self_attn)
    with pytest.raises(InputError, match=r"layer 1: attention.* numbers of queries.* and as many of a gate"):
        convert(model, processor, answered("qwen3_5", 3), ConversionConfig())


def test_a_gate_is_refused_where_the_family_has_none():
    model, processor = original("internvl-qwen3")
    attention = decoder_layers(model)[0].self_attn
    attention.q_proj = torch.nn.Linear(attention.q_proj.in_features, 2 * attention.q_proj.out_features)
    with pytest.raises(InputError, match=r"layer 0: attention.* projects to 128 numbers of queries"):
        convert(model, processor, answered("internvl-qwen3", 3), ConversionConfig())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layer_types", ["sliding_attention", "full_attention"] * 2, "sliding-window attention is not"),
        ("layer_types", ["hybrid", "full_attention"] * 2, "layers of hybrid are not supported in qwen3_5"),
    ],
)
def test_other_kinds_of_layers_are_refused(field, value, message):
    model, processor = original("qwen3_5")
    setattr(model.config.text_config, field, value)
    with pytest.raises(InputError, match=message):
        convert(model, processor, answered("qwen3_5", 3), ConversionConfig())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"qk_rope_head_dim": 8}, "layer 0: qk_rope_head_dim is 8; give null"),
        ({"qk_rope_head_dim": [None, 12, None, 12]}, "R = 12: give an even number from 2 to those that"),
        ({"rotate_at": [None, "read", None, None]}, "layer 3: rotate_at is null; give write or read"),
    ],
)
def test_sizes_that_it_cannot_have_are_refused(changed, message):
    model, _ = random_mla("qwen3_5", **SMALL)
    mla = MLAConfig.from_dict(model.config.mla | {"kv_lora_rank": [None, 20, None, 20]} | changed)
    if changed == {"qk_rope_head_dim": 8}:
        mla = replace(mla, kv_lora_rank=20)
    config_class, model_class = mla_classes("qwen3_5")
    with pytest.raises(InputError, match=message):
        model_class(config_class(**model.config.to_dict() | {"mla": mla.to_dict()}))


def test_padding_takes_no_part(name, rotate_at):
    model, processor = random_mla(name, **SMALL, rotate_at=rotate_at)
    together = prompt_inputs(name, processor, MIXED)
    got = real_tokens(whole_logits(model, together), together)
    rows = [prompt_inputs(name, processor, [prompt]) for prompt in MIXED[:1]]
    alone = whole_logits(model, rows[0])[0]
    torch.testing.assert_close(got[: len(alone)], alone, **CLOSE)
    output = model.generate(**together, **greedy(model), return_dict_in_generate=True)
    assert isinstance(cache_of(output), LatentCache)
    one = model.generate(**rows[0], **greedy(model))
    assert torch.equal(output.sequences[0, -5:], one[0, -5:])


def test_calibration_sees_the_attention_of_the_layer():
    """Dims that are not rotated are pairs that turn by nothing; metrics are in the order of the module's
    dims.
    """
    model, processor = original("qwen3_5")
    batch = encode(processor, [record("qwen3_5", "image")])
    layer = decoder_layers(model)[1].self_attn
    with calls_of(layer) as calls, torch.no_grad():
        model(**batch, use_cache=False)
    _, given, _ = calls[0]
    hidden, tables = given["hidden_states"], given["position_embeddings"]
    with torch.no_grad():
        heads = Heads.of(layer, hidden, tables, given["attention_mask"])
        queries, _ = normed_queries(layer, hidden)
        keys, values = (x[0].transpose(0, 1) for x in keys_and_values(layer, hidden))
        plain = queries[0].transpose(0, 1)
        rotated = [x[0] for x in apply_rotary_pos_emb(plain[None], keys[None], *tables)]
        torch.testing.assert_close(heads.rotated()[0].sum(-1), rotated[0].sum(-1), **CLOSE)
        weights = torch.ones(hidden.shape[1])
        modality = (torch.arange(hidden.shape[1]) > 6).long()
        output = layer.o_proj.weight.unflatten(1, (-1, layer.head_dim))
        options = {"modalities": 2, "scaling": layer.scaling, "gate": heads.gate}
        received, expected = attention_usage(*rotated, values, plain, output, modality, weights, **options)
        found = layer_usage(layer, heads, latent_inputs(layer, hidden), modality, weights)
    assert heads.turned == 4
    torch.testing.assert_close(found["vision"].metric, expected[1].to(found["vision"].metric.dtype), **CLOSE)
    assert received.sum() > 0
