"""The tables of methods: what they name is there, is described once, and does what it says."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import mha2mla_vlm.algorithms
from mha2mla_vlm.algorithms.factorization import FACTORIZATIONS, factorization
from mha2mla_vlm.algorithms.factorization.base import Outputs
from mha2mla_vlm.algorithms.pair_selection import PAIR_SELECTIONS, pair_selection
from mha2mla_vlm.algorithms.pair_selection.base import Attended
from mha2mla_vlm.algorithms.token_stats import TokenStats
from mha2mla_vlm.conversion.config import ConversionConfig

ALGORITHMS = Path(mha2mla_vlm.algorithms.__file__).parent
METHOD_PAGE = Path(__file__).parents[2] / "docs" / "method.md"
G, D, HIDDEN = 2, 8, 12  # KV heads, head dim


@pytest.mark.parametrize(
    ("folder", "entries"), [("pair_selection", PAIR_SELECTIONS), ("factorization", FACTORIZATIONS)]
)
def test_every_file_with_a_method_has_a_line(folder, entries):
    found = {p.stem for p in (ALGORITHMS / folder).glob("*.py") if "\nMETHOD = " in p.read_text("utf-8")}
    assert found == {entry.module for entry in entries.values()}


@pytest.mark.parametrize("name", [*PAIR_SELECTIONS, *FACTORIZATIONS])
def test_every_method_is_in_the_help_and_in_the_documents(name):
    helps = " ".join(field.metadata.get("help", "") for field in fields(ConversionConfig))
    assert f"{name}: " in helps
    rows = [row for row in METHOD_PAGE.read_text("utf-8").splitlines() if row.startswith("| `")]
    assert any(name in re.findall("`([^`]+)`", row.split("|")[1]) for row in rows)


@pytest.mark.parametrize("name", PAIR_SELECTIONS)
def test_a_pair_selection_gives_different_pairs_of_each_head(name):
    method, generator = pair_selection(name), torch.Generator().manual_seed(0)
    ways = [x for x in (method.fixed, method.chat_scores, method.covariance_scores) if x is not None]
    assert len(ways) == 1
    scores = None
    if method.chat_scores is not None:
        heads = [torch.randn(n, 5, D, generator=generator) for n in (2 * G, G)] * 2
        scores = method.chat_scores(Attended(*heads, 0.5))
    if method.covariance_scores is not None:
        features = torch.randn(G, 20, 3 * D // 2, generator=generator, dtype=torch.float64)
        scores = method.covariance_scores(features.transpose(1, 2) @ features, True)
    pairs = method.pairs(scores, rope_dim=4, kv_heads=G, rotary_dim=D)
    assert pairs.shape == (G, 2)
    assert bool((pairs.diff() > 0).all())
    assert 0 <= int(pairs.min()) <= int(pairs.max()) < D // 2


@pytest.mark.parametrize("name", [name for name in FACTORIZATIONS if name not in ("none", "split")])
def test_a_factorisation_of_full_rank_reproduces_the_outputs(name):
    method, generator = factorization(name), torch.Generator().manual_seed(0)
    key_dims = torch.tensor([[0, 2, 3], [1, 4, 7]])
    weight = torch.randn(G * (3 + D), HIDDEN, generator=generator)
    tokens = None
    if method.statistics != "nothing":
        inputs = torch.randn(40, HIDDEN, generator=generator)
        root = torch.randn(2, G, D, D, generator=generator, dtype=torch.float64)
        tokens = TokenStats.of(inputs + 1.0, metric=root @ root.transpose(-1, -2))
    rank = 6 + 16 if method.apart else HIDDEN  # of keys and of values
    factors = method.factors(Outputs(weight, key_dims), tokens, rank)
    assert (factors.shift is not None) == method.centered
    torch.testing.assert_close(factors.up @ factors.down, weight.double(), rtol=0, atol=1e-6)
