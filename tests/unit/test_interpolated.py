"""Scores of keys rotated at read, interpolated between the nodes of blocks, against keys that are made."""

import pytest
import torch
from helpers import original
from transformers import LlamaConfig, Qwen2_5_VLTextConfig, Qwen3VLTextConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from mha2mla_vlm.bench.context import positions_of
from mha2mla_vlm.model import blocks
from mha2mla_vlm.model.absorbed import Up
from mha2mla_vlm.model.interpolated import rotated_scores
from mha2mla_vlm.model.modality import Kind, Run
from mha2mla_vlm.model.positions import Rotation
from mha2mla_vlm.model.rebuilt import Angles, rebuilt_keys
from mha2mla_vlm.model.shipped import ZOO_NAMES

RANK, DIM, TOKENS = 24, 128, 3000
RUNS = (Run(0, 150, Kind.TEXT), Run(150, 2550, Kind.VISION), Run(2550, TOKENS, Kind.TEXT))


@pytest.fixture(params=ZOO_NAMES)
def family(request):
    """Of the zoo, and one whose multimodal RoPE is interleaved."""
    return request.param


def rotation_of(family, batch=1):
    """Positions of a text with images, as a 7B model counts them."""
    if family == "qwen2_5_vl":
        rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
        config = Qwen2_5_VLTextConfig(hidden_size=4 * DIM, num_attention_heads=4, rope_parameters=rope)
        rotary = Qwen2_5_VLRotaryEmbedding(config)
    elif family == "qwen3_vl":
        rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "rope_theta": 5e6}
        rope |= {"mrope_interleaved": True}
        config = Qwen3VLTextConfig(num_attention_heads=4, head_dim=DIM, rope_parameters=rope)
        rotary = Qwen3VLTextRotaryEmbedding(config)
    else:
        rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
        config = LlamaConfig(hidden_size=4 * DIM, num_attention_heads=4, rope_parameters=rope)
        rotary = LlamaRotaryEmbedding(config)
    positions = positions_of(original(family)[0], TOKENS, batch, torch.device("cpu")).clone()
    positions[:, 1:] = (positions[:, 1:] - 700).clamp(min=0)  # as where a row is padded
    return Rotation(rotary, positions, torch.empty(0), config)


def scores_of(family, kv_heads, tolerance, pairs=None, batch=1, heads=4):
    """Interpolated and made scores, and the plan."""
    torch.manual_seed(0)
    rotation = rotation_of(family, batch)
    pairs = torch.arange(DIM // 2).repeat(kv_heads, 1) if pairs is None else pairs
    rope_dim = 2 * pairs.shape[1]
    outputs = kv_heads * (2 * DIM)
    ups = [Up(torch.randn(outputs, RANK), torch.randn(outputs), kv_heads, DIM - rope_dim, rope_dim)] * 2
    ups[1] = Up(torch.randn(outputs, RANK), torch.randn(outputs), kv_heads, DIM - rope_dim, rope_dim)
    latent, queries = (
        torch.randn(batch, TOKENS, RANK),
        torch.randn(batch, kv_heads, heads // kv_heads, rope_dim),
    )
    plan = blocks.plan_blocks(rotation, pairs, RUNS, heads, tolerance)
    angles = Angles.of(rotation, pairs)
    keys = rebuilt_keys(latent, ups, RUNS, None, angles.columns(0, TOKENS))
    made = (queries @ keys.transpose(-1, -2)).flatten(1, 2)
    return rotated_scores(queries, latent, ups, plan, angles), made, plan


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_same_scores(family, kv_heads, batch):
    got, made, plan = scores_of(family, kv_heads, 1e-5, batch=batch)
    assert any(some.terms for some in plan)
    assert (got - made).abs().max() < 1e-4 * made.std()


def test_scores_of_some_pairs_that_differ_by_head(family):
    pairs = torch.tensor([[0, 24, 33, 40, 48, 50, 55, 60], [9, 30, 41, 44, 50, 55, 58, 63]])
    got, made, _ = scores_of(family, 2, 1e-5, pairs=pairs)
    assert (got - made).abs().max() < 1e-4 * made.std()


def test_the_tolerance_is_what_is_lost(family):
    """Negative control: with a coarse one there are fewer products, and an error of its size."""
    fine, made, plan = scores_of(family, 2, 1e-5)
    coarse, _, cheap = scores_of(family, 2, 1e-1)
    assert max(len(some.terms) for some in cheap) < max(len(some.terms) for some in plan)
    error = (coarse - made).abs().max() / made.std()
    assert (fine - made).abs().max() / made.std() < 1e-4 < error < 1


def test_no_key_of_an_image_is_made():
    """Of multimodal RoPE: pairs of the time axis, the fastest, stand still within an image."""
    _, _, plan = scores_of("qwen2_5_vl", 2, 1e-3)
    visual = [some for some in plan if some.kind == Kind.VISION]
    assert visual
    assert all(some.rebuilt == 0 and len(some.terms) <= 5 for some in visual)


def test_many_queries_make_all_keys(family):
    """Where a block of queries shares the keys, making them is less arithmetic."""
    assert blocks.plan_blocks(rotation_of(family), torch.arange(64).repeat(2, 1), RUNS, 4096, 1e-3) is None


def test_rows_of_other_modality_are_left_to_made_keys(family):
    runs = (Run(0, TOKENS, Kind.MIXED),)
    assert blocks.plan_blocks(rotation_of(family), torch.arange(64).repeat(2, 1), runs, 4, 1e-3) is None


def test_frequencies_are_those_of_the_model(family):
    rotation = rotation_of(family)
    angles, axes = rotation.frequencies
    torch.testing.assert_close(angles, rotation.rotary.inv_freq, rtol=1e-5, atol=0)
    counts = [16, 24, 24] if family == "qwen2_5_vl" else [64]
    expected = torch.repeat_interleave(torch.tensor(counts))
    if family == "qwen3_vl":
        expected = torch.tensor([0, 1, 2] * 20 + [0] * 4)
    assert torch.equal(axes, expected)


@pytest.mark.parametrize("pairs", [[0, 1, 2], [3, 17, 40, 63], range(64)], ids=len)
@pytest.mark.parametrize("batch", [1, 2])
def test_tables_of_pairs_are_those_of_all_places(family, batch, pairs):
    pairs = torch.tensor(pairs)
    rotation = rotation_of(family, batch)
    if family == "llava_next":
        rotation.rotary.attention_scaling = 1.5
    tokens = torch.arange(40, TOKENS, 7)
    expected = rotation.at(rotation.positions[..., tokens].float())
    rounding = 2e-6 + 3e-7 * rotation.frequencies[0][pairs] * int(rotation.positions.max())  # of angles
    for got, table in zip(rotation.of_pairs(tokens, pairs), expected, strict=True):
        assert ((got - table[..., pairs]).abs() < rounding).all()
    before_the_first = rotation.positions - 1
    rotation = Rotation(rotation.rotary, before_the_first, torch.empty(0), rotation.config)
    assert int(before_the_first.min()) == -1
    cos, _ = rotation.of_pairs(torch.arange(3), pairs)
    assert torch.equal(cos, rotation.at(before_the_first[..., :3].float())[0][..., pairs])
