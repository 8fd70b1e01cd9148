"""Which layers are rotated at write, which at read: least loss within the budget and the arithmetic."""

import itertools
import random
from dataclasses import replace

import pytest

from mha2mla_vlm.algorithms.budget import Option, choose, least_work
from mha2mla_vlm.config import DECOUPLED, AttentionSizes, MLAConfig
from mha2mla_vlm.conversion.allocation import LayerLosses, allocated, least_decode_cost
from mha2mla_vlm.conversion.config import ConversionConfig

SIZES = AttentionSizes(layers=6, heads=8, kv_heads=4, head_dim=64, hidden=512)
MLA = MLAConfig(qk_rope_head_dim=64, kv_lora_rank=64, rotate_at="read", modalities=DECOUPLED, kv_bias=True)


def some_options(layers, seed, count=5):
    rng = random.Random(seed)
    return [
        [
            Option(rng.randint(1, 6), rng.choice((0.5, 1, 3, 9)) + rng.random(), rng.random())
            for _ in range(count)
        ]
        for _ in range(layers)
    ]


def every(options, budget, most):
    """All that is within both limits, with its loss."""
    for numbers in itertools.product(*(range(len(layer)) for layer in options)):
        units, work, loss = map(
            sum, zip(*(each[n] for each, n in zip(options, numbers, strict=True)), strict=True)
        )
        if units <= budget and work <= most:
            yield list(numbers), loss


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [8, 12, 24])
@pytest.mark.parametrize("most", [6.0, 12.0, 40.0])
def test_nothing_within_both_limits_is_better(seed, budget, most):
    options = some_options(4, seed)
    expected = min((loss for _, loss in every(options, budget, most)), default=None)
    if expected is None:
        with pytest.raises(ValueError, match="units"):
            choose(options, budget, most)
        return
    numbers = choose(options, budget, most)
    found = {tuple(n): loss for n, loss in every(options, budget, most)}
    assert found[tuple(numbers)] == pytest.approx(expected)


def test_a_limit_at_the_least_work_is_met():
    options = some_options(4, 1)
    least = least_work(options, 24)
    assert sum(layer[n].work for layer, n in zip(options, choose(options, 24, least), strict=True)) <= least
    with pytest.raises(ValueError, match="the least work in 24 units"):
        choose(options, 24, 0.99 * least)


def losses_of(seed, ratio=0.1):
    """Layers that need different sizes, and lose `ratio` as much rotated at read."""
    rng, layers = random.Random(seed), []
    for _ in range(SIZES.layers):
        scale = rng.uniform(0.01, 1.0)
        write = {units: scale * 0.6**units for units in range(1, 16)}
        layers.append(
            LayerLosses(rope=write, latent=write, read={u: ratio * scale * 0.7**u for u in range(1, 33)})
        )
    return layers


def auto(**given):
    return ConversionConfig(rotate_at="auto", **given)


@pytest.mark.parametrize("budget", [0.125, 0.25, 0.5])
def test_a_tight_limit_gives_all_write_and_a_loose_one_what_read_gives(budget):
    losses = losses_of(0)
    tight = allocated(MLA, losses, SIZES, auto(budget=budget, max_decode_cost=0.6))
    assert tight.rotate_at == "write"
    assert tight.folded
    assert tight.rope_selection == "residual"
    loose = allocated(MLA, losses, SIZES, auto(budget=budget, max_decode_cost=1000.0))
    assert loose == allocated(MLA, losses, SIZES, auto(budget=budget).of("read"))
    assert not loose.folded
    assert loose.rope_selection is None


def test_where_write_loses_least_it_gets_the_whole_budget():
    """Without the bytes of positions, which nothing reads."""
    losses = losses_of(0, ratio=1e4)
    found = allocated(MLA, losses, SIZES, auto(budget=0.25))
    expected = allocated(MLA, losses, SIZES, auto(budget=0.25).of("write"))
    assert found.rotate_at == "write"
    assert sum(found.predicted_kl) == pytest.approx(sum(expected.predicted_kl))
    assert found.token_bytes(SIZES, 1) == 0.25 * SIZES.layers * SIZES.numbers_per_token


@pytest.mark.parametrize("budget", [0.07, 0.125, 0.3])
@pytest.mark.parametrize("limit", [3.0, 6.0, 12.0])
def test_between_both_budget_and_limit_are_kept_and_less_is_lost_than_at_write(budget, limit):
    losses = losses_of(1)
    found = allocated(MLA, losses, SIZES, auto(budget=budget, max_decode_cost=limit))
    found.check(SIZES)
    assert found.decode_cost(SIZES) <= limit
    assert found.token_bytes(SIZES, 2) <= budget * 2 * SIZES.layers * SIZES.numbers_per_token
    more = allocated(MLA, losses, SIZES, auto(budget=budget, max_decode_cost=2 * limit))
    assert sum(more.predicted_kl) <= sum(found.predicted_kl)
    assert "read" in found.rotate_at


def test_layers_that_lose_less_at_write_stay_there():
    losses = losses_of(2)
    for index in (1, 4):  # these need neither rope dims nor many latent dims
        free = dict.fromkeys(range(1, 16), 0.0)
        losses[index] = LayerLosses(rope=free, latent=free, read=losses[index].read)
    found = allocated(MLA, losses, SIZES, auto(budget=0.25, max_decode_cost=1000.0))
    assert found.rotate_at == ["read", "write", "read", "read", "write", "read"]
    assert found.folded
    assert [rope == 64 for rope in found.qk_rope_head_dim] == [mode == "read" for mode in found.rotate_at]


def test_what_a_cached_token_takes_is_counted():
    """The multiples of the shapes of 7B models at an eighth of the cache."""
    for heads, kv_heads, hidden, expected in ((28, 4, 3584, 10.1), (32, 8, 4096, 34), (32, 32, 4096, 516.5)):
        sizes = AttentionSizes(layers=28, heads=heads, kv_heads=kv_heads, head_dim=128, hidden=hidden)
        read = MLAConfig(qk_rope_head_dim=128, kv_lora_rank=32 * kv_heads, rotate_at="read")
        assert read.decode_cost(sizes) == pytest.approx(expected, rel=0.02)
        write = replace(read, qk_rope_head_dim=16, kv_lora_rank=16 * kv_heads, rotate_at="write")
        assert write.decode_cost(sizes) == pytest.approx((16 + 2 * 16 * kv_heads) / 256)
        assert replace(write, kv_lora_rank=None).decode_cost(sizes) == 1.0
        some = replace(read, qk_rope_head_dim=64)
        assert some.decode_cost(sizes) < read.decode_cost(sizes)


def test_the_least_arithmetic_is_that_of_least_sizes_at_write():
    least = MLAConfig(qk_rope_head_dim=4, kv_lora_rank=4 * SIZES.kv_heads)
    assert least_decode_cost(MLA, SIZES, auto(budget=0.25)) == pytest.approx(least.decode_cost(SIZES))
