"""Partial RoPE: which pairs are chosen, and what their scores mean."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mha2mla_vlm.algorithms.pair_selection import pair_selection
from mha2mla_vlm.algorithms.pair_selection.base import split_dims, top_pairs
from mha2mla_vlm.algorithms.pair_selection.mkl import pair_kl_scores
from mha2mla_vlm.algorithms.pair_selection.two_norm import two_norm_scores
from mha2mla_vlm.model.rope import rotate

G, M, T, D = 2, 3, 9, 8  # KV heads, query heads of each, tokens, head dim
P = D // 2


def random_heads(seed=0, tokens=T, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(G * M, tokens, D, generator=generator, dtype=dtype)
    keys = torch.randn(G, tokens, D, generator=generator, dtype=dtype)
    return queries * torch.linspace(0.3, 2.0, D, dtype=dtype), keys


def rotary_tables(tokens, head_dim=D, theta=100.0):
    """`cos, sin [1, T, D]` as transformers makes them: both halves equal."""
    frequencies = theta ** -(torch.arange(head_dim // 2, dtype=torch.float32) / (head_dim // 2))
    angles = torch.arange(tokens)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)[None]
    return angles.cos(), angles.sin()


@pytest.mark.parametrize(
    ("kind", "rope_dim", "expected"),
    [
        ("high", 8, [0, 1, 2, 3]),
        ("low", 8, [4, 5, 6, 7]),
        ("uniform", 8, [0, 2, 4, 6]),
        ("uniform", 4, [0, 4]),
        ("uniform", 6, [0, 2, 5]),
        ("high", 2, [0]),
        ("low", 2, [7]),
        ("low", 16, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("uniform", 16, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_fixed_pairs_of_sixteen_dims_are_those_worked_out_by_hand(kind, rope_dim, expected):
    pairs = pair_selection(kind).pairs(None, kv_heads=3, rotary_dim=16, rope_dim=rope_dim)
    assert pairs.tolist() == [expected] * 3
    assert pairs.dtype == torch.int64


@pytest.mark.parametrize("head_dim", [8, 64, 96, 128])
def test_uniform_pairs_are_distinct_ascending_and_in_range_for_every_rope_dim(head_dim):
    for rope_dim in range(2, head_dim + 1, 2):
        pairs = pair_selection("uniform").pairs(None, kv_heads=1, rotary_dim=head_dim, rope_dim=rope_dim)[0]
        assert len(pairs) == rope_dim // 2
        assert bool((pairs.diff() > 0).all())
        assert pairs[0] == 0
        assert pairs[-1] < head_dim // 2


def test_top_pairs_are_the_best_of_each_head_in_ascending_order():
    scores = torch.tensor([[0.1, 5.0, 0.2, 4.0], [9.0, -1.0, 0.0, 8.0]])
    assert top_pairs(scores, 4).tolist() == [[1, 3], [0, 3]]
    assert top_pairs(scores, 2).tolist() == [[1], [0]]
    assert top_pairs(scores, 8).tolist() == [[0, 1, 2, 3]] * 2


def test_rotating_all_dims_equals_transformers():
    queries, keys = (x[None] for x in random_heads())
    cos, sin = rotary_tables(T)
    expected = apply_rotary_pos_emb(queries, keys, cos, sin)
    half = cos[:, None, :, :P], sin[:, None, :, :P]
    for x, wanted in zip((queries, keys), expected, strict=True):
        torch.testing.assert_close(rotate(x, *half), wanted, rtol=0, atol=1e-6)


def test_rotating_kept_dims_equals_those_dims_of_the_full_rotation():
    _, keys = random_heads()
    cos, sin = (table[0, :, :P] for table in rotary_tables(T))
    full = rotate(keys, cos, sin)
    pairs = torch.tensor([[0, 2], [1, 3]])
    rope, _ = split_dims(pairs, D)
    for head in range(G):
        columns = pairs[head]
        part = rotate(keys[head][:, rope[head]], cos[:, columns], sin[:, columns])
        torch.testing.assert_close(part, full[head][:, rope[head]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rope_dim", [2, 6, 10, 16])
def test_split_dims_is_a_permutation_with_rope_dims_in_pair_order_and_others_ascending(rope_dim):
    head_dim = 16
    generator = torch.Generator().manual_seed(rope_dim)
    pairs = top_pairs(torch.rand(3, head_dim // 2, generator=generator), rope_dim)
    rope, others = split_dims(pairs, head_dim)
    assert rope.shape == (3, rope_dim)
    assert others.shape == (3, head_dim - rope_dim)
    assert torch.cat([rope, others], dim=1).sort(dim=1).values.tolist() == [list(range(head_dim))] * 3
    assert torch.equal(rope[:, : rope_dim // 2], pairs)
    assert torch.equal(rope[:, rope_dim // 2 :], pairs + head_dim // 2)
    assert torch.equal(others, others.sort(dim=1).values)


def naive_two_norm(queries, keys):
    scores = torch.zeros(G, P)
    for head in range(G):
        for pair in range(P):
            dims = [pair, pair + P]
            key_length = torch.stack([keys[head, t, dims].norm() for t in range(T)]).mean()
            for member in range(M):
                query = queries[head * M + member]
                query_length = torch.stack([query[t, dims].norm() for t in range(T)]).mean()
                scores[head, pair] += query_length * key_length
    return scores


def test_two_norm_scores_equal_a_plain_loop():
    queries, keys = random_heads()
    torch.testing.assert_close(two_norm_scores(queries, keys), naive_two_norm(queries, keys))


def test_two_norm_scores_are_the_same_for_rotated_and_plain_inputs():
    queries, keys = random_heads()
    cos, sin = (table[0, :, :P] for table in rotary_tables(T))
    rotated = two_norm_scores(rotate(queries, cos, sin), rotate(keys, cos, sin))
    torch.testing.assert_close(rotated, two_norm_scores(queries, keys))


def naive_masking_kl(queries, keys, scaling, rows):
    """Two softmaxes for each pair, query and head, in float64, as the definition says."""
    queries, keys = queries.double(), keys.double()
    scores = torch.zeros(G, P, dtype=torch.float64)
    for head in range(G):
        for pair in range(P):
            total = 0.0
            for member in range(M):
                for row in rows:
                    query, seen = queries[head * M + member, row], keys[head, : row + 1]
                    masked = query.clone()
                    masked[[pair, pair + P]] = 0
                    p = (seen @ query * scaling).softmax(0)
                    q = (seen @ masked * scaling).softmax(0)
                    total += float((p * (p / q).log()).sum())
            scores[head, pair] = total / (M * len(rows))
    return scores


def test_masking_kl_equals_two_softmaxes_for_each_pair():
    queries, keys = random_heads(seed=1)
    expected = naive_masking_kl(queries, keys, 0.5, range(T))
    assert float(expected.min()) > 1e-3  # so that the comparison means something
    torch.testing.assert_close(pair_kl_scores(queries, keys, 0.5).double(), expected, rtol=1e-4, atol=1e-6)


def test_masking_kl_of_a_pair_that_no_query_uses_is_zero():
    queries, keys = random_heads(seed=2)
    queries[..., [1, 1 + P]] = 0
    scores = pair_kl_scores(queries, keys, 0.5)
    assert float(scores[:, 1].abs().max()) < 1e-6
    assert float(scores[:, [0, 2, 3]].min()) > 1e-3


def test_masking_kl_takes_at_most_max_queries_evenly_spread():
    queries, keys = random_heads(seed=3)
    few = pair_kl_scores(queries, keys, 0.5, max_queries=3)
    torch.testing.assert_close(
        few.double(), naive_masking_kl(queries, keys, 0.5, [0, 4, 8]), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("max_queries", [T, T + 1, 1000])
def test_more_max_queries_than_tokens_change_nothing(max_queries):
    queries, keys = random_heads(seed=4)
    every = naive_masking_kl(queries, keys, 1.0, range(T))
    scores = pair_kl_scores(queries, keys, 1.0, max_queries=max_queries)
    torch.testing.assert_close(scores.double(), every, rtol=1e-4, atol=1e-6)
