"""Allocation of one budget over layers: exact, and what is around it."""

import itertools
import random

import pytest

from mha2mla_vlm.algorithms.budget import allocate, interpolate, unit_dims


def curves(layers, seed, units=(1, 2, 3, 4)):
    rng = random.Random(seed)
    return [{u: rng.random() / u for u in units} for _ in range(layers)]


def loss(sizes, rope, latent):
    return sum(r[a] + c[b] for (a, b), r, c in zip(sizes, rope, latent, strict=True))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [6, 9, 14, 24])
def test_no_other_allotment_within_the_budget_is_better(seed, budget):
    rope, latent = curves(3, seed), curves(3, seed + 100)
    best = allocate(rope, latent, budget)
    assert sum(a + b for a, b in best) <= budget
    every = itertools.product(itertools.product(range(1, 5), repeat=2), repeat=3)
    within = [sizes for sizes in every if sum(a + b for a, b in sizes) <= budget]
    assert loss(best, rope, latent) == pytest.approx(min(loss(s, rope, latent) for s in within))


def test_of_equal_losses_the_smaller_sizes_are_taken():
    flat = [{1: 0.5, 2: 0.5, 3: 0.5}]
    assert allocate(flat, flat, 6) == [(1, 1)]


def test_a_budget_below_the_least_sizes_is_an_error():
    with pytest.raises(ValueError, match="5 units do not hold the least sizes of 3 layers"):
        allocate(curves(3, 0), curves(3, 1), 5)


def test_interpolation_goes_through_the_measured_points_and_never_rises():
    losses = interpolate({2: 0.4, 4: 0.1, 6: 0.2, 8: 0.001}, 10)
    assert set(losses) == set(range(1, 11))
    assert losses[2] == pytest.approx(0.4)
    assert losses[3] == pytest.approx(0.2)  # the geometric mean
    assert losses[4] == pytest.approx(0.1)
    assert losses[6] == pytest.approx(0.1)  # noise above a smaller size's loss is not believed
    assert losses[1] == pytest.approx(0.8)
    assert losses[10] == losses[8] == pytest.approx(0.001)
    assert all(losses[u] >= losses[u + 1] for u in range(1, 10))


@pytest.mark.parametrize(("head_dim", "unit"), [(16, 2), (32, 2), (64, 4), (96, 6), (128, 8)])
def test_a_unit_is_an_even_sixteenth_of_the_head_dim(head_dim, unit):
    assert unit_dims(head_dim) == unit
