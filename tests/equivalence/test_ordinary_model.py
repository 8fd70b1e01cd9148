"""A converted model is an ordinary transformers model: for code that compiles, exports, offloads or quantises
it, adapts it, asks for its attentions, or takes it without its head.

Logits are compared, not greedy tokens, which stay equal with logits far off.
"""

import copy

import pytest
import torch
import transformers
from accelerate import disk_offload
from helpers import (
    original,
    piecewise_logits,
    prompt_inputs,
    random_mla,
    set_attention,
    shallow,
    whole_logits,
)
from torch import nn
from transformers import AutoModel, DynamicCache

from mha2mla_vlm import InputError, convert, save
from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.model.cache.latent import LatentCache
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.modeling import decoder_layers, mla_inner_class
from mha2mla_vlm.model.normed import is_normed
from mha2mla_vlm.utils.compat import cache_argument, cache_of, is_plain, is_plain_tensor

CLOSE = {"atol": 2e-4, "rtol": 2e-4}


def decoded(model, inputs, cache=None, steps=4):
    """Logits of a prompt and of its last tokens, each over the cache."""
    length = inputs["input_ids"].shape[1]
    return piecewise_logits(model, inputs, range(length - steps, length), cache or LatentCache())


def ups(model):
    return [up for layer in decoder_layers(model) for up in layer.self_attn.kv_b_proj.values()]


def test_the_model_without_head_finds_the_modality_itself(family):
    model, processor = random_mla(family)
    inputs = prompt_inputs(family, processor, ["image", "text", "two images"])
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), model(**inputs, use_cache=False).logits)


def test_auto_model_loads_it_without_head(family, tmp_path):
    model, processor = random_mla(family)
    inner = AutoModel.from_pretrained(save(model, processor, tmp_path / "model"))
    assert type(inner) is mla_inner_class(get_family(family))
    inputs = prompt_inputs(family, processor, ["image"])
    expected = model.model(**inputs).last_hidden_state
    torch.testing.assert_close(inner.eval()(**inputs).last_hidden_state, expected)


def test_both_names_of_the_cache_are_taken(family):
    model, processor = random_mla(family)
    inputs = prompt_inputs(family, processor, ["text"])
    for name in ("cache", "past_key_values"):
        cache = LatentCache()
        model.model(**inputs, **{name: cache}, use_cache=True)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]


@torch.no_grad()
def test_rows_of_a_plain_cache_may_be_permuted(family):
    model, processor = random_mla(family)
    inputs = prompt_inputs(family, processor, ["image", "text"])
    cache, order = DynamicCache(), torch.tensor([1, 0])
    model(**inputs, **cache_argument(cache), use_cache=True)
    step = {
        "input_ids": inputs["input_ids"][:, -1:],
        "attention_mask": nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
        "position_ids": torch.full((2, 1), 40).expand(*([3] if "mm_token_type_ids" in inputs else []), 2, 1),
    }
    other = copy.deepcopy(cache)
    expected = model(**step, **cache_argument(cache), use_cache=True).logits[order]
    other.reorder_cache(order)
    step["input_ids"], step["attention_mask"] = step["input_ids"][order], step["attention_mask"][order]
    found = model(**step, **cache_argument(other), use_cache=True).logits
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_decoded_token_is_text_and_nobody_waits_for_it(family):
    model, processor = random_mla(family)
    inputs = prompt_inputs(family, processor, ["image"])
    cache = cache_of(model(**inputs, use_cache=True))
    prompt = cache.token_modality
    token = torch.empty(1, 1, dtype=torch.long, device="meta")  # cannot be looked at
    found = model.model._modality({"input_ids": token}, cache)
    assert [tuple(run) for run in found.runs] == [(0, 1, 0)]
    assert cache.token_modality is prompt


def test_chunks_of_embeddings_are_the_whole():
    """Marks around images are found wherever a prompt is cut, and none is made up."""
    model, processor = random_mla("qwen2_5_vl")
    inputs = prompt_inputs("qwen2_5_vl", processor, ["two images"])
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    embeds = model.get_input_embeddings()(ids)
    filled = torch.where(types[..., None] > 0, torch.randn_like(embeds), embeds)  # images in place
    expected = model.model._modality({"input_ids": ids}, None)
    for cut in range(1, ids.shape[1]):
        parts = [
            model.model._modality({"inputs_embeds": filled[:, a:b], "mm_token_type_ids": types[:, :b]}, None)
            for a, b in ((0, cut), (cut, ids.shape[1]))
        ]
        assert torch.equal(torch.cat(parts, dim=1), expected)
    types = types.clone()
    types[0, 0] = 1  # an image without marks
    found = model.model._modality({"inputs_embeds": filled, "mm_token_type_ids": types}, None)
    assert torch.equal(found[:, 1:], expected[:, 1:])


def test_attentions_are_those_of_the_weights(family):
    model, processor = random_mla(family)
    model.set_attn_implementation("eager")
    inputs = prompt_inputs(family, processor, ["image", "text"])
    out = model(**inputs, output_attentions=True, use_cache=False)
    layers, length = len(decoder_layers(model)), inputs["input_ids"].shape[1]
    heads = model.config.text_config.num_attention_heads
    assert [a.shape for a in out.attentions] == [(2, heads, length, length)] * layers
    sums = out.attentions[0].sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    how = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    steps = model.generate(**inputs, **how, output_attentions=True).attentions
    assert [[a.shape[-2:] for a in step] for step in steps[1:]] == [
        [(1, length + 1 + i)] * layers for i in range(2)
    ]
    torch.testing.assert_close(steps[0][1], out.attentions[1])


def test_exported_forward_is_the_forward():
    model, processor = random_mla("llava")
    inputs = prompt_inputs("llava", processor, ["image"]) | {"use_cache": False}
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs, strict=False)
        torch.testing.assert_close(exported.module()(**inputs).logits, model(**inputs).logits, **CLOSE)


def test_decoding_over_a_dynamic_cache_is_one_graph():
    model, processor = random_mla("llava")
    model = shallow(model)
    inputs = prompt_inputs("llava", processor, ["image"])
    expected = decoded(model, inputs)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # which a reset does not
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        cache = cache_of(model(**{k: v[:, :-4] if v.ndim == 2 else v for k, v in inputs.items()}))
        for step in range(-4, 0):
            stop = inputs["input_ids"].shape[1] + step + 1
            piece = {
                "input_ids": inputs["input_ids"][:, stop - 1 : stop],
                "attention_mask": inputs["attention_mask"][:, :stop],
            }
            found = compiled(**piece, **cache_argument(cache), use_cache=True).logits[:, 0]
            torch.testing.assert_close(found, expected[:, step], **CLOSE)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


def test_weights_on_disk(family, tmp_path):
    model, processor = random_mla(family)
    inputs = prompt_inputs(family, processor, ["image"])
    expected = decoded(model, inputs)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert not any(map(is_plain, ups(model)))
    torch.testing.assert_close(decoded(model, inputs), expected, **CLOSE)


class Halved(nn.Linear):
    """A linear layer that is more than its weight."""

    def forward(self, x):
        return super().forward(x) / 2


def test_a_subclass_of_linear_is_called(family):
    model, processor = random_mla(family)
    for layer in decoder_layers(model):
        for name, up in layer.self_attn.kv_b_proj.items():
            halved = Halved(up.in_features, up.out_features, bias=up.bias is not None)
            halved.load_state_dict(up.state_dict())
            layer.self_attn.kv_b_proj[name] = halved
    inputs = prompt_inputs(family, processor, ["image"])
    torch.testing.assert_close(decoded(model, inputs), whole_logits(model, inputs), **CLOSE)


def test_weights_in_eight_bits_by_torchao(family):
    quantization = pytest.importorskip("torchao.quantization")
    model, processor = random_mla(family)
    model = model.to(torch.bfloat16)
    config = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(
        model, config, filter_fn=lambda m, name: isinstance(m, nn.Linear) and "kv_b" in name
    )
    assert not is_plain_tensor(ups(model)[0].weight)
    inputs = prompt_inputs(family, processor, ["image"])
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    found, expected = decoded(model, inputs).float(), whole_logits(model, inputs).float()
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_weights_in_eight_bits_by_bitsandbytes(family):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, processor = random_mla(family)
    for layer in decoder_layers(model):
        for name, up in layer.self_attn.kv_b_proj.items():
            small = bitsandbytes.nn.Linear8bitLt(
                up.in_features, up.out_features, bias=up.bias is not None, has_fp16_weights=False
            )
            small.load_state_dict(up.state_dict())
            layer.self_attn.kv_b_proj[name] = small.to("cpu")
    inputs = prompt_inputs(family, processor, ["image"])
    found, expected = decoded(model, inputs), whole_logits(model, inputs)
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_adapters_on_factors(family):
    """peft finds both factors of both modalities by these names."""
    peft = pytest.importorskip("peft")
    model, processor = random_mla(family)
    factors = ("kv_a_proj", "kv_b_proj")
    names = [f"{factor}.{modality}" for factor in factors for modality in ("text", "vision")]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    count = sum(name.endswith("lora_A.default.weight") for name, _ in adapted.named_parameters())
    assert count == 4 * len(decoder_layers(model))
    inputs = prompt_inputs(family, processor, ["image"])
    base = adapted.get_base_model().eval()
    torch.testing.assert_close(decoded(base, inputs), whole_logits(base, inputs), **CLOSE)
    plain = whole_logits(random_mla(family)[0], inputs)
    assert not torch.allclose(whole_logits(base, inputs), plain, atol=0.1)


def test_an_adapter_of_the_original_is_refused(family, tmp_path):
    """Unless queries and keys are normed: then what it adapts is all still there."""
    peft = pytest.importorskip("peft")
    base, _ = original(family)
    config = peft.LoraConfig(
        r=2, target_modules=r".*(language|text)_model.*\.self_attn\.(q|k|v)_proj", init_lora_weights=False
    )
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    model, processor = random_mla(family)
    if not is_normed(decoder_layers(model)[0].self_attn):
        with pytest.raises(ValueError, match="not supported"):
            peft.PeftModel.from_pretrained(model, tmp_path)
        return
    inputs = prompt_inputs(family, processor, ["image"])
    plain = whole_logits(model, inputs)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path).get_base_model()
    assert not torch.allclose(whole_logits(adapted, inputs), plain, atol=0.1)


def test_unmerged_adapters_are_not_converted(family):
    peft = pytest.importorskip("peft")
    base, processor = original(family)
    config = peft.LoraConfig(r=2, target_modules=r".*(language|text)_model.*\.self_attn\.v_proj")
    adapted = peft.get_peft_model(base, config).get_base_model()
    with pytest.raises(InputError, match="merge adapters"):
        convert(adapted, processor, [], ConversionConfig())


def test_the_class_of_the_original_refuses_converted_weights(family, tmp_path):
    """It would make up keys and values, with a warning. Where these are normed it is the original."""
    model, processor = random_mla(family)
    folder = save(model, processor, tmp_path / "model")
    stock = getattr(transformers, get_family(family).model_class)
    if not is_normed(decoder_layers(model)[0].self_attn):
        with pytest.raises(RuntimeError, match="ismatch"):
            stock.from_pretrained(folder)
        return
    found, info = stock.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in found.state_dict().items())


def test_tensor_parallel_plan_names_what_is_there(family):
    model, _ = random_mla(family)
    names = [name.rpartition(".")[0] for name, _ in model.named_parameters()]
    patterns = [key.replace("*", "0") for key in model.tp_plan]
    stock = original(family)[0].tp_plan
    assert any("mlp" in pattern for pattern in patterns) == any("mlp" in key for key in stock)
    assert [p for p in patterns if not any(name == p or name.endswith(f".{p}") for name in names)] == []


def test_pairs_are_set_where_no_checkpoint_gives_them(family):
    model, _ = random_mla(family)
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
    filled = empty.to_empty(device="cpu")
    for layer in decoder_layers(filled):
        layer.self_attn.rope_pairs.fill_(-1)
    filled.init_weights()
    for layer in decoder_layers(filled):
        kept = layer.self_attn.rope_dim // 2
        assert layer.self_attn.rope_pairs.tolist() == [list(range(kept))] * layer.self_attn.kv_heads


def test_no_warning_reaches_the_user(family, recwarn, caplog):
    model, processor = random_mla(family)
    model.generate(**prompt_inputs(family, processor, ["image"]), max_new_tokens=3, do_sample=False)
    told = [str(w.message) for w in recwarn] + [r.getMessage() for r in caplog.records]
    assert [text for text in told if "deprecated" in text or "past_key_values" in text] == []


def test_foreign_quantised_caches_take_their_default_group(mla, family):
    pytest.importorskip("hqq")
    model, processor = mla(family)
    inputs = prompt_inputs(family, processor, ["image"])
    how = {"cache_implementation": "quantized", "cache_config": {"backend": "hqq", "nbits": 8}}
    found = model.generate(**inputs, **how, max_new_tokens=4, do_sample=False)
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [None, "dynamic", "static", "sliding_window"])
def test_caches_of_transformers_hold_latents(family, name):
    model, processor = random_mla(family)
    inputs = prompt_inputs(family, processor, ["image", "text"])
    set_attention(model, absorb_limit=10**6)
    how = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(**inputs, **how, cache_implementation=name)
    assert torch.equal(out.sequences, model.generate(**inputs, **how).sequences)
    assert cache_of(out).layers[0].keys.shape[1] == 1
