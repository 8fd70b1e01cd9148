"""The caches that `benchmarks/frontier.py` compares with: what they count and what they keep."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

HEADS, KV_HEADS, D = 4, 2, 64


@pytest.fixture(scope="module")
def caches():
    """The module of the benchmarks."""
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module("caches")
    sys.path.remove(folder)


@pytest.fixture
def layer(caches):
    """A layer of 40 tokens; all queries look at token 7, and a little at all others."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, KV_HEADS, 40, D, generator=generator)
    attention = torch.full((HEADS, 40, 40), 0.1 / 40)
    attention[:, :, 7] = 0.9
    queries = torch.randn(40, HEADS, D, generator=generator)
    cos, sin = torch.ones(3, D), torch.zeros(3, D)
    return caches.Layer(keys=keys, values=values, attention=attention, queries=queries, cos=cos, sin=sin)


@pytest.mark.parametrize(
    ("tokens", "residual", "few"), [(64, 32, 32), (63, 32, 0), (100, 32, 64), (40, None, 40)]
)
@pytest.mark.parametrize("bits", [2, 4])
def test_bytes_of_a_quantised_cache(caches, tokens, residual, few, bits):
    codes = 2 * few * D * bits // 8
    ranges = [D for _ in range(0, few, 32)] + [
        D // 32
    ] * few  # of keys for each group, of values for each token
    whole = 2 * 2 * D * (tokens - few)
    found = caches.kivi_bytes(tokens, kv_heads=KV_HEADS, head_dim=D, bits=bits, residual=residual)
    assert found == KV_HEADS * (codes + 4 * sum(ranges) + whole)


def test_a_long_quantised_cache_takes_its_bits_and_one_more_for_ranges(caches):
    found = caches.kivi_bytes(32 * 10**6, kv_heads=1, head_dim=D, bits=2, residual=32)
    assert found / (32 * 10**6 * 2 * D * 2) == pytest.approx(3 / 16, rel=1e-5)


@pytest.mark.parametrize("dim", [1, 2])
def test_a_group_has_few_values_and_small_errors(caches, dim):
    x = torch.randn(KV_HEADS, 40, D, generator=torch.Generator().manual_seed(1))
    found = caches.kivi(x, dim, 2, 8)
    assert torch.equal(found[:, 32:], x[:, 32:])
    groups, exact = (part[:, :32].split(32, dim) for part in (found, x))
    for group, original in zip(groups, exact, strict=True):
        rows = group.movedim(dim, -1).flatten(0, -2)
        assert max(len(row.unique()) for row in rows) <= 4
        spread = original.amax(dim) - original.amin(dim)
        assert ((group - original).abs().amax(dim) <= spread / 6 + 2e-3).all()


def test_eviction_keeps_the_best_tokens_in_order(caches):
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.8], [0.7, 0.0, 0.6, 0.5]])
    assert caches.kept_tokens(scores, 2).tolist() == [[1, 3], [0, 2]]


def test_snapkv_keeps_what_is_looked_at_and_the_last_tokens(caches, layer):
    kept = caches.kept_tokens(caches.snapkv_scores(layer, 10), 10).tolist()
    assert kept == [[5, 6, 7, 8, 9, 35, 36, 37, 38, 39]] * KV_HEADS  # pooled over five neighbours


def test_expected_attention_keeps_the_first_tokens_and_likely_keys(caches, layer):
    mean = layer.queries[caches.SINKS :].mean(0)
    layer.keys[:, 20] = 50 * mean.unflatten(0, (KV_HEADS, -1)).mean(1)
    kept = caches.kept_tokens(caches.expected_scores(layer, 8), 8)
    assert kept[:, :4].tolist() == [[0, 1, 2, 3]] * KV_HEADS
    assert (kept == 20).any(dim=1).all()


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_an_evicted_cache(caches, layer, share):
    cache, size = caches.evicted_cache(caches.snapkv_scores, share)([layer], None)
    places = caches.kept_tokens(caches.snapkv_scores(layer, int(share * 40)), int(share * 40))
    assert size == share * 40 * 2 * KV_HEADS * D * 2
    for head, kept in enumerate(places):
        assert torch.equal(cache.layers[0].keys[0, head], layer.keys[head, kept])
        assert torch.equal(cache.layers[0].values[0, head], layer.values[head, kept])
