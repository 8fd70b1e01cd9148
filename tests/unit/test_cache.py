"""The latent cache: equal to plain concatenation, grown in steps, with the modality of its tokens."""

import copy

import pytest
import torch
from helpers import with_factors, with_partial_rope
from transformers import DynamicCache

from mha2mla_vlm.algorithms.pair_selection import high
from mha2mla_vlm.algorithms.pair_selection.base import RopeSelection
from mha2mla_vlm.calibration.statistics import LayerStats
from mha2mla_vlm.config import MLAConfig
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.cache.latent import (
    GROWTH,
    LatentCache,
    LatentLayer,
    bytes_per_token,
    cache_bytes,
    hold_latents,
    track_modality,
)
from mha2mla_vlm.model.modality import MAX_RUNS, Kind, TokenModality
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.model.shipped import ZOO_NAMES
from mha2mla_vlm.utils.compat import cache_of
from mha2mla_vlm.zoo.architectures import new_model

G, R, RANK = 2, 4, 6  # KV heads, rope dims, latent dims


def tokens(rows, count, seed):
    """Latents and rotated keys of `count` new tokens."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(rows, 1, count, RANK, generator=generator)
    return latent, torch.randn(rows, G, count, R, generator=generator)


def make_mask(*rows):
    return torch.tensor([[letter == "v" for letter in row] for row in rows])


def test_buffers_stay_in_place_between_steps_of_growth():
    layer = LatentLayer()
    layer.update(*tokens(2, 10, seed=0))
    places = []
    for step in range(2 * GROWTH):
        layer.update(*tokens(2, 1, seed=step))
        places.append((layer.keys.data_ptr(), layer.values.data_ptr()))
    moves = [i for i in range(1, len(places)) if places[i] != places[i - 1]]
    # 10 tokens fit exactly; every new one past the room makes room for up to GROWTH more
    assert moves == [GROWTH - 10, 2 * GROWTH - 10]


def test_a_prompt_gets_exactly_the_room_that_it_needs():
    layer = LatentLayer()
    layer.update(*tokens(2, GROWTH + 3, seed=0))
    assert layer.keys.untyped_storage().nbytes() == 2 * (GROWTH + 3) * RANK * 4
    assert layer.values.untyped_storage().nbytes() == 2 * (GROWTH + 3) * G * R * 4


def assert_same(ours, plain, layers=2):
    assert ours.get_seq_length() == plain.get_seq_length()
    for index in range(layers):
        assert torch.equal(ours.layers[index].keys, plain.layers[index].keys)
        assert torch.equal(ours.layers[index].values, plain.layers[index].values)


# Each operation is a method of the cache and its argument; "add" appends that many tokens.
SEQUENCES = {
    "growth": [("add", GROWTH - 1), ("add", 1), ("add", 1), ("add", 3 * GROWTH), ("add", 1)],
    "crop": [("add", 8), ("add", 1), ("add", 1), ("crop", -2), ("add", 1), ("crop", -4), ("add", 3)],
    "crop to nothing": [("add", 5), ("add", 1), ("crop", -6), ("add", 4), ("add", 1)],
    "crop by nothing": [("add", 5), ("crop", 0), ("add", 1)],
    "crop and refill past the room": [("add", 5), ("add", 1), ("crop", -1), ("add", GROWTH), ("add", 1)],
    "beams": [
        ("add", 7),
        ("batch_repeat_interleave", 2),
        ("add", 1),
        ("reorder_cache", [1, 1, 3, 2]),
        ("add", 1),
    ],
    "reorder twice": [
        ("add", 3),
        ("reorder_cache", [1, 0]),
        ("reorder_cache", [1, 1]),
        ("add", 2),
        ("add", 1),
    ],
    "same order": [("add", 3), ("add", 1), ("reorder_cache", [0, 1]), ("add", 1), ("crop", -1), ("add", 1)],
    "fewer rows": [("add", 4), ("add", 1), ("batch_select_indices", [1]), ("add", 1), ("add", 2)],
    "rows chosen twice": [
        ("add", 4),
        ("batch_select_indices", [1, 0, 1]),
        ("add", 1),
        ("crop", -1),
        ("add", 1),
    ],
    "select after crop": [("add", 4), ("add", 3), ("crop", -2), ("batch_select_indices", [0]), ("add", 1)],
    "reset": [("add", 4), ("add", 1), ("reset", None), ("add", 3), ("add", 1)],
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_the_cache_equals_plain_concatenation(name):
    ours, plain = LatentCache(), DynamicCache()
    rows = 2
    for step, (operation, argument) in enumerate(SEQUENCES[name]):
        for cache in (ours, plain):
            if operation == "add":
                for index in range(2):
                    returned = cache.update(*tokens(rows, argument, seed=10 * step + index), index)
                    assert torch.equal(returned[0], cache.layers[index].keys)
            elif operation == "reset":
                cache.reset()
            else:
                given = torch.tensor(argument) if isinstance(argument, list) else argument
                getattr(cache, operation)(given)
        if operation == "batch_repeat_interleave":
            rows *= argument
        elif isinstance(argument, list):
            rows = len(argument)
        if operation != "reset":
            assert_same(ours, plain)


def test_reset_forgets_all_tokens_and_their_storage():
    cache = LatentCache()
    cache.update(*tokens(2, 5, seed=0), 0)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache_bytes(cache) == cache_bytes(cache, allocated=True) == 0
    check_runs(track_modality(cache, make_mask("tv", "vv")), make_mask("tv", "vv"))
    cache.update(*tokens(3, 2, seed=1), 0)  # another number of rows than before
    assert cache.layers[0].keys.shape == (3, 1, 2, RANK)


def test_a_deep_copy_does_not_share_tokens_with_the_cache():
    cache = LatentCache()
    cache.update(*tokens(1, 4, seed=0), 0)
    cache.update(*tokens(1, 1, seed=1), 0)
    other = copy.deepcopy(cache)
    before = cache.layers[0].keys.clone()
    other.crop(-2)
    other.update(*tokens(1, 2, seed=2), 0)
    assert torch.equal(cache.layers[0].keys, before)
    assert not torch.equal(other.layers[0].keys, before)


def test_gradients_flow_through_the_cache():
    layer = LatentLayer()
    first, rope = tokens(1, 3, seed=0)
    first.requires_grad_()
    layer.update(first, rope)
    second, rope = tokens(1, 2, seed=1)
    keys, _ = layer.update(second.requires_grad_(), rope)
    (keys * torch.arange(5.0)[:, None]).sum().backward()
    assert first.grad[0, 0, :, 0].tolist() == [0, 1, 2]
    assert second.grad[0, 0, :, 0].tolist() == [3, 4]


def kinds_by_position(mask):
    """What `TokenModality.runs` must say of each position, worked out column by column."""
    kinds = []
    for column in mask.T.tolist():
        kinds.append(Kind.VISION if all(column) else Kind.MIXED if any(column) else Kind.TEXT)
    return kinds


def check_runs(modality, mask):
    assert torch.equal(modality.mask, mask)
    position, kinds = 0, []
    for start, stop, kind in modality.runs:
        assert start == position, "runs must cover every position once, in order"
        assert stop > start
        kinds += [kind] * (stop - start)
        position = stop
    assert position == mask.shape[1]
    assert kinds == kinds_by_position(mask)


def random_mask(rows, length, seed):
    """Few runs of visual tokens in each row, mostly at the same places."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for _ in range(3):
        start, size = (int(torch.randint(0, length, (1,), generator=generator)) for _ in range(2))
        mask[torch.rand(rows, generator=generator) < 0.8, start : start + size // 2] = True
    return mask


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("seed", range(8))
def test_runs_parts_and_extensions_equal_the_mask_they_stand_for(rows, seed):
    first, second = random_mask(rows, 23, seed), random_mask(rows, 17, seed + 100)
    one, two = TokenModality.from_mask(first), TokenModality.from_mask(second)
    check_runs(one, first)
    both = torch.cat([first, second], dim=1)
    check_runs(one.extend(two), both)
    whole = TokenModality.from_mask(both)
    for start in range(0, 40, 3):
        for stop in range(start + 1, 41, 4):
            check_runs(whole.part(start, stop), both[:, start:stop])
            check_runs(one.extend(two).part(start, stop), both[:, start:stop])


def test_runs_of_a_mask_worked_out_by_hand():
    modality = TokenModality.from_mask(make_mask("ttvvvtt", "tttvvtt"))
    expected = [(0, 2, Kind.TEXT), (2, 3, Kind.MIXED), (3, 5, Kind.VISION), (5, 7, Kind.TEXT)]
    assert [tuple(run) for run in modality.runs] == expected


def test_generated_text_joins_the_last_run():
    modality = TokenModality.from_mask(make_mask("tvvt"))
    for _ in range(100):
        modality = modality.extend(TokenModality.from_mask(make_mask("t")))
    assert [tuple(run) for run in modality.runs] == [
        (0, 1, Kind.TEXT),
        (1, 3, Kind.VISION),
        (3, 104, Kind.TEXT),
    ]


def test_an_empty_part_can_be_extended():
    modality = TokenModality.from_mask(make_mask("tv"))
    check_runs(modality.part(0, 0).extend(modality), modality.mask)


def test_more_runs_than_pay_become_one_mixed_run():
    most = TokenModality.from_mask(make_mask("tv" * (MAX_RUNS // 2)))
    assert len(most.runs) == MAX_RUNS
    over = TokenModality.from_mask(make_mask("tv" * (MAX_RUNS // 2) + "t"))
    assert [tuple(run) for run in over.runs] == [(0, MAX_RUNS + 1, Kind.MIXED)]
    grown = most.extend(TokenModality.from_mask(make_mask("t")))
    assert [tuple(run) for run in grown.runs] == [(0, MAX_RUNS + 1, Kind.MIXED)]
    assert torch.equal(grown.mask, over.mask)


def filled_cache(mask, kind=LatentCache):
    cache = kind()
    hold_latents(cache, [True])
    modality = track_modality(cache, mask)
    cache.update(*tokens(mask.shape[0], mask.shape[1], seed=0), 0)
    return cache, modality


@pytest.mark.parametrize("kind", [LatentCache, DynamicCache])
def test_modality_is_remembered_over_steps_whatever_the_cache(kind):
    cache, _ = filled_cache(make_mask("tvvt", "tttv"), kind)
    modality = track_modality(cache, make_mask("t", "t"))
    check_runs(modality, make_mask("tvvtt", "tttvt"))


def test_without_a_cache_only_the_new_tokens_count():
    check_runs(track_modality(None, make_mask("tv")), make_mask("tv"))


def test_modality_follows_a_cropped_cache():
    cache, _ = filled_cache(make_mask("tvvt", "tttv"))
    track_modality(cache, make_mask("ttt", "ttt"))
    cache.update(*tokens(2, 3, seed=1), 0)
    cache.crop(-2)
    check_runs(track_modality(cache, make_mask("tv", "tv")), make_mask("tvvtttv", "tttvttv"))


def test_modality_starts_anew_with_an_emptied_cache():
    cache, _ = filled_cache(make_mask("tvvt", "tttv"))
    cache.crop(-4)
    check_runs(track_modality(cache, make_mask("vt", "tt")), make_mask("vt", "tt"))


def test_modality_follows_repeated_rows():
    cache, _ = filled_cache(make_mask("tvvt", "tttv"))
    cache.batch_repeat_interleave(2)
    expected = make_mask("tvvtt", "tvvtt", "tttvt", "tttvt")
    check_runs(track_modality(cache, make_mask("t", "t", "t", "t")), expected)


def test_modality_follows_selected_rows_that_are_alike():
    cache, _ = filled_cache(make_mask("tvvt", "tvvt", "tvvt"))
    cache.batch_select_indices(torch.tensor([0, 2]))
    check_runs(track_modality(cache, make_mask("t", "t")), make_mask("tvvtt", "tvvtt"))


def test_modality_follows_selected_rows():
    cache, _ = filled_cache(make_mask("tvvt", "tttv", "tttt"))
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert torch.equal(track_modality(cache, make_mask("t", "t")).mask, make_mask("tvvtt", "ttttt"))


def test_rows_of_another_cache_that_differ_and_were_selected_are_refused():
    cache = DynamicCache()
    cache.update(*tokens(3, 4, seed=0), 0)
    cache.token_modality = TokenModality.from_mask(make_mask("tvvt", "tttv", "tttt"))
    cache.batch_select_indices(torch.tensor([0, 2]))
    with pytest.raises(InputError, match="from 3 to 2 rows"):
        track_modality(cache, make_mask("t", "t"))


@pytest.mark.parametrize("kind", [LatentCache, DynamicCache])
def test_modality_follows_reordered_rows_that_differ(kind):
    cache, _ = filled_cache(make_mask("tvvt", "tttv"), kind)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(track_modality(cache, make_mask("t", "t")).mask, make_mask("tttvt", "tvvtt"))


def test_a_cache_filled_elsewhere_is_refused():
    cache = DynamicCache()
    cache.update(*tokens(1, 5, seed=0), 0)
    with pytest.raises(InputError, match="5 tokens of unknown modality"):
        track_modality(cache, make_mask("t"))
    known, _ = filled_cache(make_mask("tv"))
    known.update(*tokens(1, 1, seed=1), 0)  # behind the model's back
    with pytest.raises(InputError, match="3 tokens of unknown modality"):
        track_modality(known, make_mask("t"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_prompt_are_those_of_its_storage(dtype):
    cache = LatentCache()
    for index in range(3):
        latent, rope = tokens(2, 37, seed=index)
        cache.update(latent.to(dtype), rope.to(dtype), index)
    storage = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
    assert cache_bytes(cache) == cache_bytes(cache, allocated=True) == storage
    assert storage == 3 * 2 * 37 * (RANK + G * R) * dtype.itemsize


def test_allocated_bytes_are_at_most_one_step_of_growth_more():
    cache, per_token = LatentCache(), 2 * (RANK + G * R) * 4
    cache.update(*tokens(2, 300, seed=0), 0)
    for step in range(GROWTH + 2):
        cache.update(*tokens(2, 1, seed=step), 0)
        used, allocated = cache_bytes(cache), cache_bytes(cache, allocated=True)
        assert used == (301 + step) * per_token
        assert used <= allocated < used + GROWTH * per_token
    cache.crop(-200)
    assert cache_bytes(cache) == (102 + GROWTH) * per_token < cache_bytes(cache, allocated=True)


def converted_by_layer(model):
    """The model with another R and r in each layer; its factors do not matter here."""
    ropes, ranks = [8, 16, 32, 64], [4, 8, 12, 20]
    kv_heads = model.config.get_text_config(decoder=True).num_key_value_heads
    pairs = [high.pairs(32, rope // 2).repeat(kv_heads, 1) for rope in ropes]
    mla = MLAConfig(qk_rope_head_dim=ropes, kv_lora_rank=ranks, factorization="weight-svd")
    partial = with_partial_rope(model, [RopeSelection(pairs=chosen) for chosen in pairs], mla)
    return partial, with_factors(partial, [LayerStats()] * 4, mla), kv_heads * sum(ropes) + sum(ranks)


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_bytes_per_token_are_those_of_the_cache_that_a_model_fills(name):
    model = new_model(name)[0].eval()
    partial, factored, elements = converted_by_layer(model)
    original = len(decoder_layers(model)) * 2 * model.config.text_config.num_key_value_heads * 64
    ids = torch.full((1, 11), 40)
    for candidate, expected in ((model, original), (partial, original), (factored, elements)):
        with torch.no_grad():
            cache = cache_of(candidate(input_ids=ids, use_cache=True))
        assert bytes_per_token(candidate.config, itemsize=4) == 4 * expected
        assert cache_bytes(cache) == 11 * bytes_per_token(candidate.config, itemsize=4)
        assert bytes_per_token(candidate.config) == 2 * expected
