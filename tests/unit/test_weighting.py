"""Metrics of errors: what they say is what the output of attention does."""

import pytest
import torch

from mha2mla_vlm.algorithms.error_metric import attention_usage

H, G, T, D, C, SCALING = 4, 2, 7, 6, 10, 0.5


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(*shape, generator=generator) for shape in ((H, T, D), (G, T, D), (G, T, D), (C, H, D))
    ]
    modality = torch.tensor([0, 0, 1, 1, 1, 0, 0])
    return *made, modality


LATER = torch.ones(T, T, dtype=torch.bool).triu(1)


def output(queries, keys, values, weight, gate=1.0, unseen=LATER):
    """Output of attention, causal by default, `[T, C]`."""
    repeat = H // G
    scores = queries @ keys.repeat_interleave(repeat, 0).transpose(1, 2) * SCALING
    attention = scores.masked_fill(unseen, -torch.inf).softmax(-1)
    return torch.einsum("htd,chd->tc", attention @ values.repeat_interleave(repeat, 0) * gate, weight)


def metrics(*, weights=None, **more):
    queries, keys, values, weight, modality = tensors()
    weights = torch.ones(T) if weights is None else weights
    return attention_usage(
        queries, keys, values, queries, weight, modality, weights, modalities=2, scaling=SCALING, **more
    )


def moved(part, group, token, error, weights, **more):
    """Squared change of the output, head by head, when one token's key or value has an error."""
    given = [x.double() for x in tensors()[:4]]
    total = 0.0
    for head in range(group * (H // G), (group + 1) * (H // G)):
        weight = torch.zeros_like(given[3])
        weight[:, head] = given[3][:, head]
        changed = [x.clone() for x in given]
        changed[1 + part][group, token] += error
        change = output(*changed[:3], weight, **more) - output(*given[:3], weight, **more)
        total += float((change.square().sum(-1) * weights).sum())
    return total


GATE = torch.rand(H, T, D, generator=torch.Generator().manual_seed(9))
BOTH_WAYS = LATER.clone()
BOTH_WAYS[2:5, 2:5] = False  # as within an image


@pytest.mark.parametrize("more", [{}, {"gate": GATE}, {"unseen": BOTH_WAYS}], ids=lambda more: "".join(more))
def test_the_metric_of_values_is_the_squared_error_of_the_output(more):
    _, metric = metrics(**more)
    modality, error = tensors()[4], torch.randn(D, generator=torch.Generator().manual_seed(3)).double()
    for kind in (0, 1):
        for group in range(G):
            tokens = (modality == kind).nonzero()[:, 0].tolist()
            expected = sum(moved(1, group, token, error, torch.ones(T), **more) for token in tokens)
            found = float(error @ metric[kind, 1, group] @ error)
            assert abs(found - expected) < 1e-4 * expected


def test_a_gate_that_is_the_same_for_all_queries_is_one_on_the_output_projection():
    queries, keys, values, weight, modality = tensors()
    gate = GATE[:, :1]
    options = {"modalities": 2, "scaling": SCALING}
    given = (queries, keys, values, queries)
    expected = attention_usage(*given, weight * gate[:, 0], modality, torch.ones(T), **options)
    found = metrics(gate=gate.expand(-1, T, -1))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_metric_of_keys_is_the_squared_error_for_small_errors():
    weights = torch.linspace(0.2, 2.0, T)
    _, metric = metrics(weights=weights)
    modality = tensors()[4]
    error = 1e-4 * torch.randn(D, generator=torch.Generator().manual_seed(3)).double()
    for kind in (0, 1):
        for group in range(G):
            tokens = (modality == kind).nonzero()[:, 0].tolist()
            expected = sum(moved(0, group, token, error, weights.double()) for token in tokens)
            found = float(error @ metric[kind, 0, group] @ error)
            assert abs(found - expected) < 1e-2 * expected


def test_attention_received_is_squared_and_weighted_by_the_query():
    queries, keys, *_ = tensors()
    weights = torch.linspace(0.2, 2.0, T)
    received, _ = metrics(weights=weights)
    scores = queries @ keys.repeat_interleave(H // G, 0).transpose(1, 2) * SCALING
    attention = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    expected = (attention.square() * weights[:, None]).sum((0, 1))
    torch.testing.assert_close(received, expected)
