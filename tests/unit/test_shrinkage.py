"""Moments and metrics drawn to what takes all directions alike."""

import torch

from mha2mla_vlm.algorithms.factorization.low_rank import METRIC_RIDGE, metric_roots, pca_factors, shrunk

D, G, HIDDEN = 4, 2, 12


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(*shape, seed=0):
    x = random(*shape, shape[-1], seed=seed)
    return x @ x.transpose(-1, -2)


def test_a_shrunk_moment_keeps_its_directions():
    moment = gram(HIDDEN)
    values, vectors = torch.linalg.eigh(moment)
    found = vectors.T @ shrunk(moment, 0.5) @ vectors
    torch.testing.assert_close(found, torch.diag(values + 0.5 * values.mean()))
    assert shrunk(moment.float(), 0.0).dtype == torch.float64


def test_between_the_pca_of_outputs_and_the_svd_of_the_weight():
    weight, moment, rank = random(8, HIDDEN), gram(HIDDEN, seed=1), 3

    def product(moment):
        factors = pca_factors(weight, moment, rank)
        return factors.up @ factors.down

    torch.testing.assert_close(product(shrunk(moment, 0.0)), product(moment))
    svd = product(torch.eye(HIDDEN, dtype=torch.float64))
    torch.testing.assert_close(product(shrunk(moment, 1e9)), svd, rtol=1e-5, atol=1e-6)


def test_rank_to_spare_goes_to_what_the_weight_does_most_with():
    """Two inputs that calibration saw much of, one little, and one not at all, which the weight enlarges."""
    weight = torch.diag(torch.tensor([1.0, 1.0, 1.0, 3.0]))
    moment = torch.diag(torch.tensor([1.0, 1.0, 0.01, 0.0]))

    def lost(share):
        factors = pca_factors(weight, shrunk(moment, share), 3)
        return (weight - factors.up @ factors.down).norm(dim=0)

    torch.testing.assert_close(lost(0.0), torch.tensor([0.0, 0.0, 0.0, 3.0]).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(lost(0.1), torch.tensor([0.0, 0.0, 1.0, 0.0]).double(), rtol=0, atol=1e-4)


def test_a_metric_is_drawn_to_all_errors_alike():
    metric, dims = gram(2, G, D), torch.arange(D).repeat(G, 1)
    blocks = [*metric.transpose(0, 1).flatten(0, 1)]
    scale = torch.stack([block.diagonal() for block in blocks]).mean()
    for shrinkage in (0.0, 1.0):
        for block, root in zip(blocks, metric_roots(metric, dims, shrinkage=shrinkage), strict=True):
            added = METRIC_RIDGE * (block.diagonal() + scale) + shrinkage * scale
            torch.testing.assert_close(root @ root.T, block + torch.diag(added))


def test_a_metric_of_nothing_but_shrinkage_is_that_of_plain_outputs():
    weight, moment = random(2 * G * D, HIDDEN), gram(HIDDEN, seed=1)
    dims = torch.arange(D).repeat(G, 1)
    roots = metric_roots(gram(2, G, D) + torch.eye(D), dims, shrinkage=1e9)
    found, expected = (pca_factors(weight, moment, 3, given) for given in (roots, ()))
    torch.testing.assert_close(found.up @ found.down, expected.up @ expected.down, rtol=1e-5, atol=1e-5)
