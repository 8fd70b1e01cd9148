"""Policies name the right parameters of every family, converted in part, whole, or not at all."""

import pytest
import torch
from helpers import original, random_mla

from mha2mla_vlm.errors import InputError
from mha2mla_vlm.training.freezing import set_trained, trained_names, with_lora


def parts(names):
    """Modules that the names lie in, without prefixes and layer numbers."""
    return {
        ".".join(p for p in name.split(".")[:-1] if not p.isdigit()).rpartition("language_model.")[2]
        for name in names
    }


ATTENTION = {"layers.self_attn.q_proj", "layers.self_attn.k_rope_proj", "layers.self_attn.o_proj"}
NORMS = {"layers.input_layernorm", "layers.post_attention_layernorm", "norm"}


def factors(kind, modalities):
    return {f"layers.self_attn.kv_{kind}_proj.{m}" for m in modalities}


def test_a_converted_model(family):
    model, _ = random_mla(family)
    both = ("text", "vision")
    down, up = factors("a", both), factors("b", both)
    assert parts(trained_names(model, "attention-and-norms")) == ATTENTION | NORMS | down | up
    assert parts(trained_names(model, "v3")) == ATTENTION - {"layers.self_attn.o_proj"} | down | up
    assert parts(trained_names(model, "v4")) == {"layers.self_attn.q_proj"} | NORMS | down | up
    assert parts(trained_names(model, "factors")) == down | up
    assert parts(trained_names(model, "down-factors")) == down
    assert not any("visual" in n or "vision_tower" in n for n in trained_names(model, "layers"))


def test_partial_rope_alone_and_an_original(family):
    partial, _ = random_mla(family, rank=None, modalities=("shared",))
    assert parts(trained_names(partial, "v4")) == {"layers.self_attn.q_proj"} | NORMS | factors(
        "a", ("shared",)
    )
    untouched, _ = original(family)
    assert parts(trained_names(untouched, "attention")) == {f"layers.self_attn.{x}_proj" for x in "qkvo"}
    with pytest.raises(InputError, match="trains nothing"):
        set_trained(untouched, "factors")


def test_what_trains_is_float32_and_nothing_else(family):
    model, _ = random_mla(family)
    count = set_trained(model.to(torch.bfloat16), "factors")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == count
    assert {p.dtype for p in trained} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_lora_adds_adapters_to_the_matrices_alone(family):
    pytest.importorskip("peft")
    model, _ = random_mla(family)
    adapted = with_lora(model, "attention-and-norms", 4)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and "norm" not in name for name in trained)
    assert sum("lora_A" in name for name in trained) == 4 * 7  # layers, and q, k, o, two down, two up
