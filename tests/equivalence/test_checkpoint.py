"""Saved models load alone, strictly, in every way that users load models."""

import json

import pytest
import torch
from helpers import original, prompt_inputs, random_mla, whole_logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mha2mla_vlm import InputError, load, load_processor, save
from mha2mla_vlm.config import AttentionSizes
from mha2mla_vlm.model.modeling import decoder_layers


@pytest.fixture
def saved(family, tmp_path):
    """A converted model in memory, its processor, and its folder."""
    model, processor = random_mla(family)
    model = load(save(model, processor, tmp_path / "first"))  # completes the config, as conversion does
    return model, processor, save(model, processor, tmp_path / "model")


def same_weights(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_load_gives_the_same_model(family, saved):
    model, _, folder = saved
    loaded = load(folder)
    assert type(loaded) is type(model)
    assert same_weights(loaded, model)
    inputs = prompt_inputs(family, load_processor(folder), ["two images"])
    assert torch.equal(whole_logits(loaded, inputs), whole_logits(model, inputs))


def test_auto_classes_know_it_after_load(saved):
    model, _, folder = saved
    load(folder)
    assert same_weights(AutoModelForImageTextToText.from_pretrained(folder), model)
    assert AutoProcessor.from_pretrained(folder).chat_template


def test_half_precision_keeps_pairs_and_dtype(saved):
    model, _, folder = saved
    loaded = load(folder, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    for name, value in loaded.state_dict().items():
        if name.endswith("rope_pairs"):
            assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize("damage", ["missing", "extra", "misshaped", "truncated"])
def test_damaged_weights_are_refused(saved, damage):
    _, _, folder = saved
    path = folder / "model.safetensors"
    key = "model.language_model.layers.1.self_attn.kv_b_proj.vision.weight"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        weights = load_file(path)
        assert key in weights
        if damage == "missing":
            del weights[key]
        elif damage == "extra":
            weights[key.replace("vision", "audio")] = weights[key].clone()
        else:
            weights[key] = weights[key][:, 1:].contiguous()
        save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError) as raised:
        load(folder)
    assert len(str(raised.value).splitlines()) == 1


def test_all_pairs_in_another_order_are_refused_at_read(family, tmp_path):
    head_dim = AttentionSizes.of(original(family)[0].config).head_dim
    model, _ = random_mla(family, rotate_at="read", rope_dim=head_dim)
    attention = decoder_layers(model)[1].self_attn
    attention.rope_pairs.copy_(attention.rope_pairs.flip(-1))
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="layer 1: rope_pairs are all pairs in another order"):
        load(tmp_path)


def test_config_with_unknown_keys_is_refused(saved):
    _, _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["mla"]["kv_lora_ranks"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="kv_lora_ranks"):
        load(folder)


def test_nothing_is_left_of_a_write_that_fails(family, tmp_path):
    model, _ = random_mla(family)

    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save(model, Broken(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_original_with_a_missing_weight_is_refused(family, tmp_path):
    model, processor = original(family)
    folder = save(model, processor, tmp_path / "original")
    weights = load_file(folder / "model.safetensors")
    (key, *_) = (
        key for key in weights if key.endswith("layers.0.self_attn.k_proj.weight") and "vis" not in key
    )
    del weights[key]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="missing keys"):
        load(folder)
