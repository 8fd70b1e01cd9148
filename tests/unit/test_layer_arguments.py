"""What layers are given is found by one pass over stubs, also where it differs between layers."""

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from mha2mla_vlm.calibration.activations import Chat, MemoryStates, advance, layer_arguments
from mha2mla_vlm.model.modality import TokenModality
from mha2mla_vlm.model.modeling import decoder_layers

TEXT = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


def two_layer_types():
    """Gemma 3: windows of 8 tokens with a rotary base of their own in five of six layers."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=TEXT | {"num_hidden_layers": 6, "sliding_window": 8},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        image_token_index=98,
        boi_token_index=97,
        eoi_token_index=96,
    )
    return Gemma3ForConditionalGeneration(config), {"input_ids": torch.randint(90, (1, 30))}


def features_between_layers():
    """Qwen3-VL: features of the tower's layers are added behind the first two decoder layers."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen3VLConfig(
        text_config=TEXT | {"num_hidden_layers": 3, "rope_parameters": rope},
        vision_config=vision | {"patch_size": 4, "deepstack_visual_indexes": [0, 1]},
        image_token_id=98,
        video_token_id=97,
        vision_start_token_id=96,
        vision_end_token_id=95,
    )
    ids = torch.randint(90, (1, 20))
    ids[0, 4:9] = torch.tensor([96, 98, 98, 98, 98])
    inputs = {"pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    types = (ids == 98).int()
    return Qwen3VLForConditionalGeneration(config), inputs | {"input_ids": ids, "mm_token_type_ids": types}


@torch.no_grad()
def through_layers(model, hidden, given, added):
    """Hidden states behind the last layer, layer by layer."""
    nothing, states = torch.zeros(hidden.shape[1]), MemoryStates()
    modality = TokenModality.of_text(1, hidden.shape[1], hidden.device)
    chat = Chat(
        number=0,
        given=given,
        added=added,
        visual=nothing.bool(),
        weights=nothing,
        answers=nothing,
        modality=modality,
    )
    states["all", 0, 0] = hidden
    for index, layer in enumerate(decoder_layers(model)):
        advance(layer, index, [chat], states, "all")
    return states["all", len(given), 0]


@pytest.mark.parametrize("make", [two_layer_types, features_between_layers])
def test_layers_one_by_one_are_the_model(make):
    torch.manual_seed(0)
    model, inputs = make()
    for layer in decoder_layers(model.eval()):
        for name in ("q_proj", "k_proj"):
            torch.nn.init.normal_(layer.self_attn.get_submodule(name).weight, std=0.3)
    layers, norm = decoder_layers(model), model.model.language_model.norm
    hidden, given, added = layer_arguments(model, inputs)
    assert decoder_layers(model) is layers
    assert model.model.language_model.norm is norm
    with torch.no_grad():
        expected = model.model(**inputs, use_cache=False).last_hidden_state
        assert torch.equal(norm(through_layers(model, hidden, given, added)), expected)
        one = given[:1] * len(given) if make is two_layer_types else given
        wrong = norm(through_layers(model, hidden, one, {}))
    assert (wrong - expected).abs().max() > 1e-2  # the comparison can see what is left out
    assert list(added) == ([] if make is two_layer_types else [1, 2])


def test_arguments_that_layers_share_are_kept_once():
    torch.manual_seed(0)
    model, inputs = two_layer_types()
    given = layer_arguments(model, inputs)[1]
    assert len({id(each["attention_mask"]) for each in given}) == 2
    assert len({id(each["position_embeddings"]) for each in given}) == 2
