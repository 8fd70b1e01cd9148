"""Which queries of a chat calibration looks at."""

import pytest
import torch

from mha2mla_vlm.calibration.activations import Chat
from mha2mla_vlm.model.modality import TokenModality


def chat(weights):
    visual = torch.zeros(len(weights), dtype=torch.bool)
    return Chat(
        number=0, given=[], added={}, visual=visual, weights=torch.tensor(weights), answers=visual[1:],
        modality=TokenModality.from_mask(visual[None]),
    )  # fmt: skip


def test_heads_that_share_keys_look_at_different_queries():
    long = chat([1.0] * 300)
    for heads, each in ((1, 64), (2, 64), (4, 32), (7, 19)):
        dealt = [rows.tolist() for rows, _ in long.queries(heads)]
        together = sorted(row for rows in dealt for row in rows)
        assert together == list(range(300 - min(128, 64 * heads), 300))  # the last of equals
        assert max(map(len, dealt)) == each


def test_those_that_count_most_are_looked_at_and_stand_for_all():
    weights = [0.1] * 200 + [1.0] * 40 + [8.0] * 10
    for rows, shares in chat(weights).some_queries(1):
        assert set(rows.tolist()) >= set(range(200, 250))
        torch.testing.assert_close(shares.sum(), torch.tensor(weights).sum())
    dealt = [rows for rows, _ in chat(weights).queries(2)]
    assert set(torch.cat(dealt).tolist()) >= set(range(200, 250))


@pytest.mark.parametrize("tokens", [1, 3])
def test_each_head_looks_at_one_query_at_least(tokens):
    for rows, shares in chat([1.0] * tokens).queries(7):
        assert len(rows) >= 1
        assert float(shares.sum()) == 1.0
