"""Sums over chats, whose bits do not depend on how many processes share them (`test_streaming` has two)."""

import pytest
import torch

from mha2mla_vlm.utils.distributed import PARTS, SharedSums, own_share


@pytest.mark.parametrize("total", [1, 5, 8, 21])
def test_sums_are_of_parts_in_their_order(total):
    items = torch.randn(total, 40, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-20, 20)
    sums = SharedSums(total)
    for number in own_share(total):
        sums.add(number, {"x": items[number], "y": items[number, 0]})
    expected = None
    for part in range(PARTS):
        for_part = items[total * part // PARTS : total * (part + 1) // PARTS]
        if len(for_part):
            whole = sum(for_part[1:], start=for_part[0])
            expected = whole if expected is None else expected + whole
    found = sums.over_processes()
    assert torch.equal(found["x"], expected)
    assert torch.equal(found["y"], expected[0])


def test_what_is_added_is_not_changed():
    first, sums = torch.ones(3), SharedSums(9)
    for number in range(9):
        sums.add(number, {"x": first})
    assert torch.equal(sums.over_processes()["x"], torch.full((3,), 9.0))
    assert torch.equal(first, torch.ones(3))
