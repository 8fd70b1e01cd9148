"""The metric of errors in keys before RoPE: what it says is what the output of attention does."""

import pytest
import torch

from mha2mla_vlm.algorithms import at_once
from mha2mla_vlm.algorithms.error_metric import attention_usage, key_metric
from mha2mla_vlm.model.rope import rotate

H, G, T, D, C, SCALING = 4, 2, 9, 6, 10, 0.5
MODALITY = torch.tensor([0, 0, 1, 1, 1, 0, 0, 1, 0])
WEIGHTS = torch.linspace(0.2, 2.0, T)
ALL = torch.ones(G, D // 2, dtype=torch.bool)
SOME = torch.tensor([[True, False, True], [False, False, True]])


def tensors(seed=0):
    """Plain queries, plain keys, values and the weight of `o_proj`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((H, T, D), (G, T, D), (G, T, D), (C, H, D))
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def tables(shift=0.0, scale=1.0):
    angles = (torch.arange(T) + shift)[:, None] * torch.tensor([1.0, 0.3, 0.05])
    return angles.cos() * scale, angles.sin() * scale


def rotated_heads(x, rotated, cos_sin):
    """Heads `[heads, T, D]` of which the pairs `rotated [G, P]` are rotated."""
    mask = rotated.repeat_interleave(len(x) // G, 0)[:, None]
    cos, sin = (table.to(x) for table in cos_sin)
    return rotate(x, torch.where(mask, cos, 1.0), torch.where(mask, sin, 0.0))


def metric(cos_sin, rotated=ALL, rows=None):
    queries, keys, values, weight = tensors()
    rows = torch.arange(T) if rows is None else rows
    turned = [rotated_heads(x, rotated, cos_sin) for x in (queries, keys)]
    return key_metric(
        *turned, values, queries, cos_sin, weight, MODALITY, [(rows, WEIGHTS[rows])] * (H // G),
        modalities=2, scaling=SCALING, rotated=None if rotated is ALL else rotated,
    )  # fmt: skip


def output(head, queries, keys, values, weight, rotated, cos_sin):
    """What one head adds to the output of causal attention, `[T, C]`."""
    queries, keys = (rotated_heads(x, rotated, cos_sin) for x in (queries, keys))
    group = head // (H // G)
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    scores = (queries[head] @ keys[group].T * SCALING).masked_fill(later, -torch.inf)
    return scores.softmax(-1) @ values[group] @ weight[:, head].T


def moved(group, token, error, rows, rotated, cos_sin):
    """Squared change of the output at `rows`, head by head, when one token's plain key has an error."""
    given = [x.double() for x in tensors()]
    changed = [x.clone() for x in given]
    changed[1][group, token] += error
    total = 0.0
    for head in range(group * (H // G), (group + 1) * (H // G)):
        before, after = (output(head, *x, rotated, cos_sin) for x in (given, changed))
        total += float(((after - before).square().sum(-1) * WEIGHTS)[rows].sum())
    return total


@pytest.mark.parametrize("rotated", [ALL, SOME], ids=["all pairs", "some pairs"])
@pytest.mark.parametrize("rows", [torch.arange(T), torch.tensor([3, 5, 8])], ids=["all queries", "some"])
@pytest.mark.parametrize("scale", [1.0, 1.3])  # longer-context variants of RoPE scale their tables
def test_it_is_the_squared_error_of_the_output_for_small_errors(rotated, rows, scale):
    cos_sin = tables(scale=scale)
    found = metric(cos_sin, rotated, rows)
    error = 1e-4 * torch.randn(D, generator=torch.Generator().manual_seed(3)).double()
    for kind in (0, 1):
        for group in range(G):
            tokens = (kind == MODALITY).nonzero()[:, 0].tolist()
            expected = sum(moved(group, token, error, rows, rotated, cos_sin) for token in tokens)
            assert abs(float(error @ found[kind, group] @ error) - expected) < 1e-2 * expected


def test_without_rotation_it_is_the_metric_of_unrotated_dims():
    queries, keys, values, weight = tensors()
    given = (queries, keys, values, queries, weight, MODALITY, WEIGHTS)
    _, expected = attention_usage(*given, modalities=2, scaling=SCALING)
    none = torch.zeros_like(ALL)
    torch.testing.assert_close(metric(tables(), none), expected[:, 0], rtol=1e-5, atol=1e-5)


def test_it_depends_on_distances_alone():
    torch.testing.assert_close(metric(tables(shift=50.0)), metric(tables()), rtol=1e-4, atol=1e-4)


def test_queries_are_turned_back_a_few_at_a_time(monkeypatch):
    whole = metric(tables())
    monkeypatch.setattr(at_once, "CACHED", 2 * T * D)
    torch.testing.assert_close(metric(tables()), whole, rtol=1e-5, atol=1e-6)


def test_a_modality_without_tokens_has_no_metric():
    queries, keys, values, weight = tensors()
    rows = torch.arange(T)
    found = key_metric(
        queries, keys, values, queries, tables(), weight, torch.zeros(T, dtype=torch.long),
        [(rows, WEIGHTS)] * (H // G),
        modalities=2, scaling=SCALING,
    )  # fmt: skip
    assert not found[1].any()
    assert found[0].any()
