"""Factors of keys and values: optimal for the inputs seen, safe for inputs hardly seen."""

import logging
from dataclasses import replace

import pytest
import torch

from mha2mla_vlm.algorithms.factorization import factorization
from mha2mla_vlm.algorithms.factorization.blocks import block_factors
from mha2mla_vlm.algorithms.factorization.low_rank import pca_factors
from mha2mla_vlm.algorithms.token_stats import TokenStats
from mha2mla_vlm.calibration.statistics import LayerStats
from mha2mla_vlm.config import DECOUPLED, SHARED, LayerSpec
from mha2mla_vlm.conversion.weights import layer_factors

O, HIDDEN = 20, 12  # noqa: E741 - outputs of the weight, named as in the package
HEAD_DIM = 4


def make_weight(outputs=O, seed=0):
    return torch.randn(outputs, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_inputs(tokens, seed=1, decades=3.0):
    """Inputs `[tokens, hidden]` whose directions differ in size by `decades`, turned at random."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64))
    return x * torch.logspace(1, 1 - decades, HIDDEN, dtype=torch.float64) @ turn


def product(factors):
    return factors.up @ factors.down


def output_error(weight, approximation, inputs):
    return float((inputs @ (weight - approximation).T).pow(2).sum())


def truncated(matrix, rank):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


def whitened_svd(weight, moment, rank):
    """REFERENCE section 2, step by step: whiten with the root of S, truncate, undo."""
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.sqrt()
    return truncated(weight @ root, rank) @ torch.linalg.inv(root)


@pytest.mark.parametrize("outputs", [O, HIDDEN - 1])  # solved on the side of inputs, and of outputs
@pytest.mark.parametrize("rank", [1, 4, 8, 11])
def test_pca_equals_the_whitened_svd_where_the_moment_has_full_rank(rank, outputs):
    weight, inputs = make_weight(outputs), make_inputs(200, decades=1.5)
    expected = whitened_svd(weight, inputs.T @ inputs, rank)
    factors = pca_factors(weight, inputs.T @ inputs, rank)
    assert factors.down.shape == (rank, HIDDEN)
    assert factors.up.shape == (outputs, rank)
    # a ridge of 1e-6 of the mean variance is all that differs
    assert float((product(factors) - expected).norm() / expected.norm()) < 1e-4
    best, ours = (output_error(weight, w, inputs) for w in (expected, product(factors)))
    assert ours <= best * (1 + 1e-6)


def test_pca_equals_the_whitened_svd_to_rounding_for_even_inputs():
    weight = make_weight()
    inputs = torch.randn(300, HIDDEN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = whitened_svd(weight, inputs.T @ inputs, 5)
    torch.testing.assert_close(
        product(pca_factors(weight, inputs.T @ inputs, 5)), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_pca_beats_the_svd_of_the_weight_on_uneven_inputs(rank):
    weight, inputs = make_weight(), make_inputs(200)
    ours = output_error(weight, product(pca_factors(weight, inputs.T @ inputs, rank)), inputs)
    assert ours < 0.5 * output_error(weight, truncated(weight, rank), inputs)


@pytest.mark.parametrize("seed", range(5))
def test_no_random_projection_of_equal_rank_is_better(seed):
    weight, inputs = make_weight(), make_inputs(200)
    ours = output_error(weight, product(pca_factors(weight, inputs.T @ inputs, 4)), inputs)
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(O, 4, generator=generator, dtype=torch.float64))
    assert ours <= output_error(weight, basis @ basis.T @ weight, inputs)


@pytest.mark.parametrize("outputs", [8, O])
def test_full_rank_reproduces_the_weight(outputs):
    weight, inputs = make_weight(outputs), make_inputs(50)
    factors = pca_factors(weight, inputs.T @ inputs, outputs)
    torch.testing.assert_close(product(factors), weight, rtol=0, atol=1e-12)


def test_rank_of_the_input_width_is_enough_where_outputs_are_more():
    weight, inputs = make_weight(O), make_inputs(50)
    factors = pca_factors(weight, inputs.T @ inputs, HIDDEN)
    torch.testing.assert_close(product(factors), weight, rtol=0, atol=1e-5)


def test_rank_as_large_as_the_outputs_seen_reproduces_outputs_of_few_tokens():
    weight, inputs = make_weight(), make_inputs(5)
    factors = pca_factors(weight, inputs.T @ inputs, 5)
    outputs = inputs @ weight.T
    error = inputs @ product(factors).T - outputs
    assert float(error.norm() / outputs.norm()) < 1e-4


@pytest.mark.parametrize("rank", [1, 5, 12, O])
def test_fewer_tokens_than_dims_give_finite_factors(rank):
    inputs = make_inputs(5)
    factors = pca_factors(make_weight(), inputs.T @ inputs, rank)
    assert bool(factors.down.isfinite().all())
    assert bool(factors.up.isfinite().all())
    directions = factors.up / factors.up.norm(dim=0)
    torch.testing.assert_close(directions.T @ directions, torch.eye(rank, dtype=torch.float64))


def test_no_input_at_all_gives_the_svd_of_the_weight():
    weight = make_weight()
    factors = pca_factors(weight, torch.zeros(HIDDEN, HIDDEN), 4)
    torch.testing.assert_close(product(factors), truncated(weight, 4), rtol=0, atol=1e-6)


def test_directions_never_seen_are_kept_by_what_the_weight_does_with_them():
    weight, inputs = make_weight(), make_inputs(3)
    factors = pca_factors(weight, inputs.T @ inputs, 8)
    seen, _ = torch.linalg.qr(inputs.T)
    unseen = torch.eye(HIDDEN, dtype=torch.float64) - seen @ seen.T
    left = ((weight - product(factors)) @ unseen).norm()
    only_seen = pca_factors(weight, inputs.T @ inputs, 3)
    basis, _ = torch.linalg.qr(
        torch.randn(O, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    rest = weight - product(only_seen)
    assert float(left) < float(((rest - basis @ basis.T @ rest) @ unseen).norm())


# Three KV heads of two key rows and four value rows, interleaved as in `kv_b_proj`.
IS_KEY = torch.arange(18) % 6 < 2
OTHERS = torch.tensor([[1, 3], [0, 2], [2, 3]])  # of head dim 4


@pytest.mark.parametrize(
    ("kept", "rank", "key_rank", "value_rank"),
    [(None, 6, 3, 3), (None, 7, 3, 4), ("values", 14, 2, 12), ("keys", 9, 6, 3)],
)
def test_block_factors_keep_keys_and_values_apart(kept, rank, key_rank, value_rank):
    weight = make_weight(18)
    factors = block_factors(weight, IS_KEY, rank, kept)
    assert factors.down.shape == (rank, HIDDEN)
    assert factors.up.shape == (18, rank)
    assert not factors.up[IS_KEY][:, key_rank:].any()
    assert not factors.up[~IS_KEY][:, :key_rank].any()
    for rows, part in ((IS_KEY, key_rank), (~IS_KEY, value_rank)):
        expected = truncated(weight[rows], part)
        torch.testing.assert_close(product(factors)[rows], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("kept", "whole"), [("values", ~IS_KEY), ("keys", IS_KEY)])
def test_the_block_kept_whole_is_exact_and_the_other_is_not(kept, whole):
    weight = make_weight(18)
    error = (product(block_factors(weight, IS_KEY, int(whole.sum()) + 3, kept)) - weight).abs()
    assert float(error[whole].max()) < 1e-12
    assert float(error[~whole].max()) > 1e-2


def make_stats(**tokens):
    inputs = (make_inputs(count, seed=seed) for seed, count in enumerate(tokens.values()))
    return LayerStats(dict(zip(tokens, map(TokenStats.of, inputs), strict=True)))


def made(weight, stats, method="md-svd", *, rank=4, layer=None):
    """Factors of a layer with partial RoPE, of three heads of which one pair of two stays rotated."""
    spec = LayerSpec(rope_dim=2, rank=rank, modalities=DECOUPLED if method == "md-svd" else SHARED)
    whole = {"rope_pairs": torch.tensor([[0], [1], [0]]), "kv_a_proj.shared.weight": weight}
    return layer_factors(whole, stats, spec, factorization(method), head_dim=HEAD_DIM, layer=layer)


@pytest.mark.parametrize("count", [None, 0, 1, HIDDEN - 1])
@pytest.mark.parametrize("modality", ["vision", "text"])
def test_a_modality_hardly_seen_gets_the_pooled_factors_and_a_warning(caplog, modality, count):
    other = "text" if modality == "vision" else "vision"
    tokens = {other: 60} if count is None else {other: 60, modality: count}
    weight, stats = make_weight(18), make_stats(**tokens)
    with caplog.at_level(logging.WARNING):
        factors = made(weight, stats, layer=3)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "layer 3" in messages[0]
    assert f"{count or 0} {modality} tokens" in messages[0]
    pooled = made(weight, stats, "activation-svd")["shared"]
    assert torch.equal(factors[modality].down, pooled.down)
    assert torch.equal(factors[modality].up, pooled.up)
    own = pca_factors(weight, stats.tokens[other].moment, 4)
    assert torch.equal(factors[other].down, own.down)
    assert torch.equal(factors[other].up, own.up)


def test_modalities_seen_enough_get_factors_of_their_own_without_a_warning(caplog):
    weight, stats = make_weight(18), make_stats(text=HIDDEN, vision=40)
    factors = made(weight, stats, layer=0)
    assert not caplog.records
    for modality, factor in factors.items():
        torch.testing.assert_close(
            product(factor), product(pca_factors(weight, stats.tokens[modality].moment, 4))
        )
    assert float((product(factors["text"]) - product(factors["vision"])).abs().max()) > 1e-2


def test_pooled_moment_is_that_of_all_tokens():
    stats = make_stats(text=7, vision=30)
    both = torch.cat([make_inputs(7, seed=0), make_inputs(30, seed=1)])
    torch.testing.assert_close(stats.pooled().moment, both.T @ both, rtol=1e-5, atol=1e-4)
    assert {m: tokens.count for m, tokens in stats.tokens.items()} == {"text": 7, "vision": 30}
    assert stats.pooled().count == 37


@pytest.mark.parametrize("method", ["weight-svd", "split", "only-key", "only-value"])
def test_baselines_of_the_weights_do_not_look_at_the_inputs(method):
    weight = make_weight(18)
    found = [made(weight, stats, method, rank=13) for stats in (make_stats(text=30), make_stats(vision=99))]
    assert set(found[0]) == {"shared"}
    assert torch.equal(product(found[0]["shared"]), product(found[1]["shared"]))


def test_a_smaller_rank_of_factors_is_the_pca_of_that_rank():
    weight, inputs = make_weight(), make_inputs(40)
    moment, mean = inputs.T @ inputs, inputs.mean(0)
    for factors in (pca_factors(weight, moment, 9), pca_factors(make_weight(8), moment, 8)):
        cut = factors.of_rank(5)
        expected = pca_factors(weight if len(factors.up) == O else make_weight(8), moment, 5)
        torch.testing.assert_close(product(cut), product(expected))
        assert torch.equal(cut.spectrum, expected.spectrum)
        assert bool((cut.spectrum.diff() <= 0).all())
    centred = replace(factors, mean=(mean, make_weight(8) @ mean)).of_rank(5)
    torch.testing.assert_close(product(centred) @ mean + centred.shift, make_weight(8) @ mean)


@pytest.mark.parametrize("outputs", [O, HIDDEN])
def test_a_metric_of_errors_counts_in_blocks(outputs):
    """What is left of `root^T (W - W') x` is what the SVD of `root^T W` leaves."""
    weight, inputs, first = make_weight(outputs), make_inputs(200, decades=1.5), outputs // 3
    generator = torch.Generator().manual_seed(7)
    roots = []
    for size in (first, outputs - first):
        x = torch.randn(size, 2 * size, generator=generator, dtype=torch.float64)
        roots.append(torch.linalg.cholesky(x @ x.T))
    whole = torch.block_diag(*roots)
    found = product(pca_factors(weight, inputs.T @ inputs, 5, roots))
    best = whitened_svd(whole.T @ weight, inputs.T @ inputs, 5)
    errors = [output_error(whole.T @ weight, w, inputs) for w in (whole.T @ found, best)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_weights_of_lower_rank_than_asked_for_come_back():
    low = make_weight()[:, :3] @ make_weight(3)
    inputs = make_inputs(200, decades=1.5)
    factors = pca_factors(low, inputs.T @ inputs, 8)
    assert bool(factors.up.isfinite().all())
    torch.testing.assert_close(product(factors), low)


@pytest.mark.parametrize("weighted", [False, True])
def test_both_factors_have_the_same_scale(weighted):
    """Training with steps of one size spoils a factor much smaller than the other."""
    weight, inputs = make_weight(), make_inputs(200)
    roots = [1e3 * torch.eye(size, dtype=torch.float64) for size in (O - 8, 8)] if weighted else []
    factors = pca_factors(weight, inputs.T @ inputs, 8, roots)
    torch.testing.assert_close(factors.up.norm(dim=0), factors.down.norm(dim=1))
    plain = pca_factors(weight, inputs.T @ inputs, 8)
    torch.testing.assert_close(product(factors), product(plain), rtol=1e-3, atol=1e-6)
