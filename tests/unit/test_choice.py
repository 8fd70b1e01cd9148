"""Which of two ways to keep latents is taken, by what is predicted and measured."""

import json

import pytest

from mha2mla_vlm.config import AttentionSizes, LatentBits, MLAConfig
from mha2mla_vlm.conversion.allocation import LayerLosses
from mha2mla_vlm.conversion.choice import better, candidates, choice, is_little
from mha2mla_vlm.conversion.config import ENOUGH, ConversionConfig
from mha2mla_vlm.conversion.layer import Measured
from mha2mla_vlm.conversion.profile import Profile

SIZES = AttentionSizes(layers=2, heads=8, kv_heads=4, head_dim=64, hidden=512)
MLA = MLAConfig(qk_rope_head_dim=64, kv_lora_rank=64, rotate_at="read", kv_bias=True)
AT_READ = ConversionConfig(rotate_at="read", budget=0.25)


def measured(*by_chat, tokens=4):
    total = sum(by_chat) / (tokens * len(by_chat))
    sums = {"factorization": list(by_chat)}
    return Measured(kl={"factorization": total}, by_chat=sums, tokens=[tokens] * len(by_chat))


@pytest.mark.parametrize(
    ("values", "bits"),
    [
        ({}, "auto"),
        ({"budget": 0.2, "rotate_at": "write"}, "auto"),
        ({"budget": 0.2, "qk_rope_head_dim": 16}, "auto"),
        ({"budget": 0.2, "d_kv": 16}, "16"),
        ({"d_kv": 16}, "16"),
        ({"factorization": "none", "qk_rope_head_dim": 16, "latent_bits": "auto"}, "16"),
        ({"latent_bits": "16"}, "16"),
        ({"latent_bits": "mixed"}, "mixed"),
    ],
)
def test_bits_are_chosen_where_a_budget_is_allocated(values, bits):
    config = ConversionConfig(**values)
    assert config.latent_bits == bits
    assert config.tried_bits == (("16", "mixed") if bits == "auto" else (bits,))
    assert ConversionConfig.from_dict(config.to_dict()) == config


def test_the_simpler_is_taken_unless_the_other_loses_less_beyond_chance():
    simple = measured(0.4, 0.1, 0.2, 0.3, 0.2, 0.1)
    assert better({"16": simple}) == "16"
    assert better({"16": simple, "mixed": measured(0.2, 0.05, 0.1, 0.2, 0.1, 0.04)}) == "mixed"
    assert better({"16": simple, "mixed": measured(0.1, 0.2, 0.1, 0.4, 0.1, 0.2)}) == "16"  # by chance
    assert better({"16": simple, "mixed": measured(0.8, 0.2, 0.4, 0.6, 0.4, 0.2)}) == "16"
    assert not is_little({"16": simple})
    assert not is_little({})
    assert is_little({"16": measured(4 * ENOUGH, 3 * ENOUGH)})


def profile(read, by_channel):
    """Layers that lose so much, whatever their size."""
    bits = {"read": {units: LatentBits(0, 0, 16 * units, 0) for units in range(1, 33)}}
    curves = {"read": {1: read, 32: read}, "by_channel": {"read": {1: by_channel, 32: by_channel}}}
    layer = LayerLosses(**curves, bits=bits)
    losses = [LayerLosses.from_dict(json.loads(json.dumps(layer.to_dict())))] * SIZES.layers
    assert losses[0] == layer
    return Profile(config=AT_READ, layers=[], losses=losses)


def test_bits_by_channel_are_tried_if_they_are_predicted_to_lose_less():
    found = candidates(MLA, profile(0.1, 0.01), SIZES, AT_READ)
    assert [mla.latent_bits is None for mla in found.values()] == [True, False]
    assert sum(found["mixed"].predicted_kl) == pytest.approx(0.02)
    for config, known in ((AT_READ, profile(0.1, 0.2)), (AT_READ.keeping("16"), profile(0.1, 0.01))):
        assert list(candidates(MLA, known, SIZES, config)) == ["16"]


def test_the_line_says_what_was_chosen_and_why():
    mlas = candidates(MLA, profile(0.1, 0.01), SIZES, AT_READ)
    tried = {"16": measured(0.4, 0.2), "mixed": measured(0.04, 0.02)}
    said = choice("mixed", "", mlas, tried)
    assert said["why"] == (
        "latents in bits by channel: on held-out chats in 16 bits KL 0.0750 (0.0500 to 0.1000), "
        "in bits by channel KL 0.0075 (0.0050 to 0.0100)"
    )
    assert said["kl"] == {"16": pytest.approx(0.075), "mixed": pytest.approx(0.0075)}
    assert choice("16", "", mlas, tried)["why"].endswith(": no clear difference")
    little = {"16": measured(0.001, 0.002)}
    assert choice("16", "", mlas, little)["why"].endswith(
        "KL 0.0004 (0.0003 to 0.0005): up to 0.001 is little"
    )
    given = choice("16", "calibration is narrow (no images)", {"16": mlas["16"]}, little)
    assert given["why"] == "latents in 16 bits: calibration is narrow (no images)"
