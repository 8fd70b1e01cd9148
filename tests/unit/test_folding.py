"""Folding: the covariance of what rotation does, the order in which pairs go, and the fold itself."""

import pytest
import torch

from mha2mla_vlm.algorithms import at_once
from mha2mla_vlm.algorithms.folding import drop_order, fold_coefficients, fold_keys, pair_covariance
from mha2mla_vlm.model.rope import rotate

H, G, T, D, SCALING = 4, 2, 9, 12, 0.4
P = D // 2


def tables(total=T):
    angles = torch.arange(total)[:, None] * torch.logspace(0, -2, P)
    return angles.cos(), angles.sin()


def heads(seed=0, total=T):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(H, total, D, generator=generator), torch.randn(G, total, D, generator=generator)


def pairs_of(x, i):
    return torch.stack([x[..., i], x[..., i + P]], dim=-1)


def naive_features(queries, keys, head, query, key):
    """x, u and w of every pair for one query and one key, one at a time."""
    cos, sin = tables(queries.shape[1])
    group = head // (H // G)
    q, k = queries[head, query], keys[group, key]
    rq, rk = rotate(q, cos[query], sin[query]), rotate(k, cos[key], sin[key])
    rows = []
    for i in range(P):
        (q1, q2), (k1, k2) = pairs_of(q, i), pairs_of(k, i)
        x = pairs_of(rq, i) @ pairs_of(rk, i)
        rows.append(torch.stack([x, q1 * k1 + q2 * k2, q1 * k2 - q2 * k1]) * SCALING)
    return torch.stack(rows, dim=1).flatten().double()


def naive_covariance(queries, keys, rows, weights):
    covariance = torch.zeros(G, 3 * P, 3 * P, dtype=torch.float64)
    for head in range(H):
        for query, weight in zip(rows.tolist(), weights.tolist(), strict=True):
            features = torch.stack([naive_features(queries, keys, head, query, j) for j in range(query + 1)])
            attention = features[:, :P].sum(1).softmax(0)
            spread = features - attention @ features
            covariance[head // (H // G)] += weight * spread.T @ (attention[:, None] * spread)
    return covariance


def covariance(seed=0, rows=None, total=T):
    queries, keys = heads(seed, total)
    rows = torch.arange(total) if rows is None else rows
    return pair_covariance(queries, keys, *tables(total), [(rows, torch.ones(len(rows)))] * (H // G), SCALING)


def test_the_covariance_is_that_of_every_query_and_key_taken_one_by_one():
    queries, keys = heads()
    rows, weights = torch.tensor([0, 3, 8]), torch.tensor([1.0, 0.5, 2.0])
    ours = pair_covariance(queries, keys, *tables(), [(rows, weights)] * (H // G), SCALING)
    torch.testing.assert_close(ours, naive_covariance(queries, keys, rows, weights), rtol=1e-4, atol=1e-5)


def test_the_covariance_is_the_same_from_a_few_queries_at_a_time(monkeypatch):
    whole = covariance()
    monkeypatch.setattr(at_once, "CACHED", 4 * T * 3 * P)
    torch.testing.assert_close(covariance(), whole, rtol=1e-5, atol=1e-5)


def variance_left(matrix, gone, *, fold):
    """Variance of the dropped pairs' errors, by least squares from the definition."""
    gone = torch.tensor(gone)
    total = torch.zeros(3 * P, dtype=torch.float64)
    total[gone] = 1.0
    if not fold:
        total[gone + P] = -1.0
        return float(total @ matrix @ total)
    index = torch.cat([gone + P, gone + 2 * P])
    solved = torch.linalg.lstsq(matrix[index][:, index], matrix[index] @ total).solution
    total[index] = -solved
    return float(total @ matrix @ total)


@pytest.mark.parametrize("fold", [True, False])
def test_pairs_go_in_the_order_of_a_greedy_search(fold):
    matrices = covariance(total=30)
    for matrix, order in zip(matrices, drop_order(matrices, fold=fold).tolist(), strict=True):
        assert sorted(order) == list(range(P))
        for step in range(P):
            left = {f: variance_left(matrix, [*order[:step], f], fold=fold) for f in order[step:]}
            assert left[order[step]] <= min(left.values()) * (1 + 1e-2)


def test_the_fold_is_the_least_squares_one_and_leaves_kept_pairs_alone():
    matrices = covariance(total=30)
    kept = torch.tensor([[0, 3], [1, 5]])
    fold = fold_coefficients(matrices, kept)
    assert fold.shape == (G, 2, P)
    for matrix, chosen, (a, b) in zip(matrices, kept, fold, strict=True):
        assert torch.equal(a[chosen], torch.ones(2, dtype=torch.float64))
        assert not b[chosen].any()
        gone = [i for i in range(P) if i not in chosen.tolist()]
        total = torch.zeros(3 * P, dtype=torch.float64)
        total[gone] = 1.0
        total[[P + i for i in gone]] = -a[gone]
        total[[2 * P + i for i in gone]] = -b[gone]
        left = float(total @ matrix @ total)
        assert left <= variance_left(matrix, gone, fold=True) * (1 + 1e-3)
        assert left < 0.9 * variance_left(matrix, gone, fold=False)


def test_a_rotation_that_is_always_the_same_folds_away():
    """All keys equally far from the query: nothing is lost."""
    queries, keys = heads(total=40)
    cos, sin = tables(2)
    turn = torch.ones(40, dtype=torch.long)
    turn[:-1] = 0  # keys at position 0, the query at 1
    rows = torch.tensor([39])
    hidden = keys.clone()
    hidden[:, -1] = 50 * -queries.unflatten(0, (G, -1)).mean(1)[:, -1]  # never attended to
    matrices = pair_covariance(
        queries, hidden, cos[turn], sin[turn], [(rows, torch.ones(1))] * (H // G), SCALING
    )
    for matrix in matrices:
        every = list(range(P))
        assert variance_left(matrix, every, fold=True) < 1e-2 * variance_left(matrix, every, fold=False)


def test_folded_keys_give_a_u_plus_b_w():
    queries, keys = heads(seed=4)
    fold = torch.randn(G, 2, P, generator=torch.Generator().manual_seed(1))
    folded = fold_keys(keys.transpose(1, 2), fold).transpose(1, 2)  # [G, D, ..] as weights are
    for head, query, key in ((0, 2, 1), (3, 7, 7)):
        group = head // (H // G)
        _, u, w = naive_features(queries, keys, head, query, key).view(3, P) / SCALING
        a, b = fold[group]
        found = queries[head, query] @ folded[group, key]
        torch.testing.assert_close(found.double(), (a * u + b * w).sum(), rtol=1e-5, atol=1e-5)
