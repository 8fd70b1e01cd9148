"""Policies name the right parameters of every family, converted in part, whole, or not at all."""

import re

import pytest
import torch
from helpers import original, random_mla

from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.model.shipped import ZOO_NAMES
from mha2mla_vlm.training.freezing import set_trained, trained_names, with_lora


def parts(names):
    """Modules that the names lie in, without prefixes and layer numbers."""
    return {
        ".".join(
            p for p in re.split(r"(?:language|text)_model\.", name)[-1].split(".")[:-1] if not p.isdigit()
        )
        for name in names
    }


@pytest.fixture(params=[*ZOO_NAMES, "idefics3"])
def family(request):
    """Of the zoo, one with norms of queries and keys, and one whose language model has another name."""
    return request.param


ATTENTION = {"layers.self_attn.q_proj", "layers.self_attn.k_rope_proj", "layers.self_attn.o_proj"}
NORMED = {f"layers.self_attn.{name}" for name in ("q_norm", "k_norm")}
NORMS = {"layers.input_layernorm", "layers.post_attention_layernorm", "norm"}


def factors(kind, modalities):
    return {f"layers.self_attn.kv_{kind}_proj.{m}" for m in modalities}


def test_a_converted_model(family):
    model, _ = random_mla(family, rope_dim=8)
    both = ("text", "vision")
    down, up = factors("a", both), factors("b", both)
    normed = family == "qwen3_vl"  # its keys and values are projected before latents are made of them
    norms = NORMS | (NORMED if normed else set())
    attention = ATTENTION | ({f"layers.self_attn.{x}_proj" for x in "kv"} if normed else set())
    assert parts(trained_names(model, "attention-and-norms")) == attention | norms | down | up
    assert parts(trained_names(model, "v3")) == attention - {"layers.self_attn.o_proj"} | down | up
    assert parts(trained_names(model, "v4")) == {"layers.self_attn.q_proj"} | norms | down | up
    assert parts(trained_names(model, "factors")) == down | up
    assert parts(trained_names(model, "down-factors")) == down
    assert not any("visual" in n or "vision_tower" in n for n in trained_names(model, "layers"))


def test_partial_rope_alone_and_an_original(family):
    partial, _ = random_mla(family, rope_dim=8, rank=None, modalities=("shared",))
    norms = NORMS | (NORMED if family == "qwen3_vl" else set())
    down = factors("a", ("shared",))
    assert parts(trained_names(partial, "v4")) == {"layers.self_attn.q_proj"} | norms | down
    untouched, _ = original(family)
    assert parts(trained_names(untouched, "attention")) == {f"layers.self_attn.{x}_proj" for x in "qkvo"}
    with pytest.raises(InputError, match="trains nothing"):
        set_trained(untouched, "factors")


def test_what_trains_is_float32_and_nothing_else(family):
    model, _ = random_mla(family, rope_dim=8)
    count = set_trained(model.to(torch.bfloat16), "factors")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == count
    assert {p.dtype for p in trained} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_lora_adds_adapters_to_the_matrices_alone(family):
    pytest.importorskip("peft")
    model, _ = random_mla(family, rope_dim=8, rank=20)
    adapted = with_lora(model, "attention-and-norms", 4)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and "norm" not in name for name in trained)
    # q, k, o, two down, two up, and with norms the keys and values that these are made of
    matrices = 9 if family == "qwen3_vl" else 7
    assert sum("lora_A" in name for name in trained) == len(decoder_layers(model)) * matrices
