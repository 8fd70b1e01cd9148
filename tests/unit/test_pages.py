"""Latents in pages: what is written is read again, and attention over them is attention over the tokens."""

import pytest
import torch

from mha2mla_vlm.model import paged, rebuilt
from mha2mla_vlm.model.absorbed import Up
from mha2mla_vlm.model.cache.pages import (
    Paged,
    is_visual,
    marked,
    position_width,
    read_positions,
    store,
    store_positions,
)
from mha2mla_vlm.model.kernels import cpu_decode
from mha2mla_vlm.model.rebuilt import Angles
from mha2mla_vlm.model.rope import rotate

SCALING = 0.2
HEADS, GROUPS, HEAD_DIM, ROPE, RANK = 6, 3, 16, 6, 20
WIDTH = RANK + GROUPS * ROPE
LENGTHS = (5, 64, 130, 1)


def ups_of(modalities, dtype=torch.float64):
    torch.manual_seed(1)
    rows = GROUPS * (2 * HEAD_DIM - ROPE)
    return tuple(
        Up(torch.randn(rows, RANK, dtype=dtype), torch.randn(rows, dtype=dtype), GROUPS, HEAD_DIM - ROPE)
        for _ in range(modalities)
    )


def reference(query, rows, visual, ups, scaling=SCALING):
    """Token by token: attention of the last tokens `query [T, H, D]` over `rows [S, C]`."""
    new, total, rope = len(query), len(rows), HEAD_DIM - ups[0].nope_dim
    output = torch.zeros_like(query)
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        for at in range(new):
            seen = range(total - new + at + 1)
            both = []
            for token in seen:
                up = ups[int(visual[token]) if len(ups) == 2 else 0]
                both.append(up.weight @ rows[token, :RANK] + up.bias)
            both = torch.stack(both).view(len(both), GROUPS, -1)[:, group]
            start = RANK + group * rope
            keys = torch.cat([rows[: len(both), start : start + rope], both[:, : HEAD_DIM - rope]], dim=-1)
            weights = (keys @ query[at, head] * scaling).softmax(0)
            output[at, head] = weights @ both[:, HEAD_DIM - rope :]
    return output


def requests(size, dtype=torch.float32, marks=True):
    """Rows and modality of requests of `LENGTHS`, and the same in shuffled pages that others share."""
    torch.manual_seed(0)
    rows = [torch.randn(n, WIDTH, dtype=dtype) for n in LENGTHS]
    visual = [torch.rand(n) < 0.4 for n in LENGTHS]
    used = [-(-n // size) for n in LENGTHS]
    places = torch.randperm(sum(used) + 3).split([*used, 3])
    pages = torch.randn(sum(used) + 3, size, WIDTH, dtype=dtype)
    table = torch.zeros(len(LENGTHS), max(used), dtype=torch.int32)
    for row, (kept, which, place) in enumerate(zip(rows, visual, places, strict=False)):
        table[row, : len(place)] = place
        tokens = torch.arange(len(kept))
        store(pages, place[tokens // size] * size + tokens % size, kept, which if marks else None, RANK)
    return rows, visual, Paged(pages, table, torch.tensor(LENGTHS, dtype=torch.int32), RANK, GROUPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_modality_is_read_again_and_costs_one_bit(dtype):
    torch.manual_seed(0)
    rows, visual = torch.randn(50, WIDTH, dtype=dtype), torch.rand(50) < 0.5
    kept = marked(rows, visual, RANK)
    assert torch.equal(is_visual(kept, RANK), visual)
    other = [i for i in range(WIDTH) if i != RANK - 1]
    assert torch.equal(kept[:, other], rows[:, other])
    change = ((kept - rows).abs() / rows.abs())[:, RANK - 1]
    assert change.max() <= torch.finfo(dtype).eps
    assert change.max() > 0


def test_pages_give_back_rows_and_modality():
    rows, visual, stored = requests(8, torch.float32)
    found, which = stored.rows(), stored.visual()
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(found[row, :length], rows[row], rtol=1e-6, atol=1e-6)
        assert torch.equal(which[row, :length], visual[row])


@pytest.mark.parametrize("modalities", [1, 2])
@pytest.mark.parametrize("size", [1, 16, 64])
def test_decoding_over_pages(modalities, size):
    ups = ups_of(modalities, torch.float32)
    rows, visual, stored = requests(size, torch.float32, marks=modalities == 2)
    query = torch.randn(len(LENGTHS), HEADS, HEAD_DIM)
    got = paged.decode(query, stored, stored.visual() if modalities == 2 else None, ups, SCALING)
    for row in range(len(LENGTHS)):
        expected = reference(query[row : row + 1], rows[row], visual[row], ups)[0]
        torch.testing.assert_close(got[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [64, 128, 16])
def test_the_cpu_kernel_over_pages(size):
    if cpu_decode.library() is None:
        pytest.skip("needs a C++ compiler and AVX-512 BF16 (see the log)")
    ups = ups_of(2, torch.bfloat16)
    rows, visual, stored = requests(size, torch.bfloat16)
    query = torch.randn(len(LENGTHS), HEADS, HEAD_DIM).bfloat16()
    q_rope, q_nope = query[:, :, None].split([ROPE, HEAD_DIM - ROPE], dim=-1)
    runs = cpu_decode.can_run(q_rope, q_nope, ups, stored, None)
    assert runs == (size % 64 == 0)
    if not runs:
        return
    got = cpu_decode.decode(q_rope, q_nope, ups, SCALING, stored, stored.visual())[:, 0]
    exact = [Up(up.weight.float(), up.bias.float(), GROUPS, up.nope_dim) for up in ups]
    for row in range(len(LENGTHS)):
        expected = reference(query[row : row + 1].float(), rows[row].float(), visual[row], exact)[0]
        assert (got[row].float() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("size", [16, 24])
def test_the_triton_kernel_over_pages(size):
    triton_decode = pytest.importorskip("mha2mla_vlm.model.kernels.triton_decode")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exact = ups_of(2, torch.float32)
    ups = [Up(up.weight.to(device), up.bias.to(device), GROUPS, up.nope_dim) for up in exact]
    rows, visual, stored = requests(size, torch.float32)
    stored = Paged(*(x.to(device) for x in (stored.pages, stored.table, stored.lengths)), RANK, GROUPS)
    query = torch.randn(len(LENGTHS), HEADS, HEAD_DIM, device=device)
    q_rope, q_nope = query[:, :, None].split([ROPE, HEAD_DIM - ROPE], dim=-1)
    assert triton_decode.can_run(q_rope, q_nope, ups, stored)
    got = triton_decode.decode(q_rope, q_nope, ups, SCALING, stored, stored.visual(), None)[:, 0].cpu()
    for row in range(len(LENGTHS)):
        expected = reference(query[row : row + 1].cpu(), rows[row], visual[row], exact)[0]
        torch.testing.assert_close(got[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("modalities", [1, 2])
@pytest.mark.parametrize(("new", "total"), [(7, 7), (1, 1), (2, 30), (20, 30), (29, 30)])
def test_prefilling(new, total, modalities, monkeypatch):
    monkeypatch.setattr(paged, "CHUNK", 8)
    ups = ups_of(modalities)
    torch.manual_seed(2)
    query = torch.randn(new, HEADS, HEAD_DIM, dtype=torch.float64)
    rows, visual = torch.randn(total, WIDTH, dtype=torch.float64), torch.rand(total) < 0.4
    got = paged.prefill(query, rows, visual if modalities == 2 else None, ups, SCALING)
    torch.testing.assert_close(got.double(), reference(query, rows, visual, ups), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("axes", [1, 3])
def test_positions_are_exact_whatever_the_dtype(axes, dtype):
    special = [0, 1, 127, 257, 0x7F80, 0x7FC1, 0xFFC1, 0x7F81FF81, 2**24 + 1, 2**31 - 1]  # NaN, as floats
    one = torch.cat([torch.tensor(special), torch.randint(0, 2**31, (44,))])
    positions = torch.stack([one.roll(axis) for axis in range(axes)])
    tokens, size, rank = positions.shape[1], 16, 5
    width = position_width(axes, dtype)
    assert width * dtype.itemsize == 4 * axes
    pages = torch.zeros(9, size, rank + width, dtype=dtype)
    slots = torch.randperm(9 * size)[:tokens]
    latents, visual = torch.randn(tokens, rank, dtype=dtype), torch.rand(tokens) < 0.5
    store(pages, slots, latents, visual, rank)
    store_positions(pages[..., rank:], slots, positions)
    copied = pages.flip(0).clone()  # as engines move pages
    for kept, table in [(pages, torch.arange(9)), (copied, torch.arange(9).flip(0))]:
        found = read_positions(kept[..., rank:], table[None].int())
        assert torch.equal(found[:, 0, slots].long(), positions)
        rows = kept[table].flatten(0, 1)[slots]
        assert torch.equal(rows[:, : rank - 1], latents[:, : rank - 1])
        assert torch.equal(is_visual(rows, rank), visual)


def at_read(modalities, dtype, rope=ROPE):
    """Up projections that make all of keys, and those without the rows of the `rope` dims to rotate."""
    torch.manual_seed(1)
    whole, rest = [], []
    for _ in range(modalities):
        weight = torch.randn(GROUPS, 2 * HEAD_DIM, RANK, dtype=dtype)
        bias = torch.randn(GROUPS, 2 * HEAD_DIM, dtype=dtype)
        sizes = GROUPS, HEAD_DIM - rope
        whole.append(Up(weight.flatten(0, 1), bias.flatten(), *sizes, rope))
        rest.append(Up(weight[:, rope:].flatten(0, 1), bias[:, rope:].flatten(), *sizes))
    return whole, rest


def tables(positions):
    """Cosines and sines of all pairs at `positions`."""
    angles = positions[..., None].double() / 7 ** torch.arange(HEAD_DIM // 2).double()
    return angles.cos().float(), angles.sin().float()


def rotated(latents, positions, visual, ups, pairs):
    """Rows as they are where keys are rotated at write, of those where they are rotated at read."""
    cos, sin = (table[:, pairs].to(latents.dtype) for table in tables(positions))  # [S, G, R/2]
    kinds = visual.long() if len(ups) == 2 else torch.zeros_like(visual).long()
    keys = torch.stack(
        [ups[k].rope @ x + ups[k].rope_bias[:, 0] for x, k in zip(latents, kinds.tolist(), strict=True)]
    )
    return torch.cat([latents, rotate(keys, cos, sin).flatten(1)], dim=1)


def pairs_of(rope):
    torch.manual_seed(3)
    return torch.stack([torch.randperm(HEAD_DIM // 2)[: rope // 2] for _ in range(GROUPS)])


@pytest.mark.parametrize("rope", [ROPE, HEAD_DIM], ids=["some pairs", "all pairs"])
@pytest.mark.parametrize("modalities", [1, 2])
@pytest.mark.parametrize(("size", "block"), [(1, 32), (16, 32), (16, 512)])
def test_decoding_over_pages_that_are_rotated_at_read(size, block, modalities, rope, monkeypatch):
    monkeypatch.setattr(rebuilt, "BLOCK", block)
    ups, rest = at_read(modalities, torch.float32, rope)
    rows, visual, stored = requests(size, torch.float32, marks=modalities == 2)
    positions = torch.randint(0, 5000, stored.visual().shape)
    angles, others = (Angles(*tables(x), pairs_of(rope)) for x in (positions, positions // 2))
    query = torch.randn(len(LENGTHS), HEADS, HEAD_DIM)
    which = stored.visual() if modalities == 2 else None
    got = paged.decode(query, stored, which, ups, SCALING, angles)
    wrong = paged.decode(query, stored, which, ups, SCALING, others)
    for row, length in enumerate(LENGTHS):
        latents, places = rows[row][:, :RANK], positions[row, :length]
        kept = rotated(latents, places, visual[row], ups, angles.pairs)
        expected = reference(query[row : row + 1], kept, visual[row], rest)[0]
        torch.testing.assert_close(got[row], expected, rtol=1e-3, atol=1e-3)
        if length > 1:  # negative control
            assert (wrong[row] - expected).abs().max() > 0.1


@pytest.mark.parametrize("rope", [ROPE, HEAD_DIM], ids=["some pairs", "all pairs"])
@pytest.mark.parametrize(("new", "total"), [(7, 7), (2, 30), (20, 30)])
def test_prefilling_what_is_rotated_at_read(new, total, rope, monkeypatch):
    monkeypatch.setattr(paged, "CHUNK", 8)
    ups, rest = at_read(2, torch.float32, rope)
    rows, visual = torch.randn(total, RANK + 2), torch.rand(total) < 0.4  # and a position
    query, positions = torch.randn(new, HEADS, HEAD_DIM), torch.randint(0, 5000, (1, total))
    angles = Angles(*tables(positions), pairs_of(rope))
    got = paged.prefill(query, rows, visual, ups, SCALING, angles)
    kept = rotated(rows[:, :RANK], positions[0], visual, ups, angles.pairs)
    torch.testing.assert_close(got, reference(query, kept, visual, rest), rtol=1e-3, atol=1e-3)


def test_text_taken_for_visual_is_seen():
    """Negative control: the comparisons see a wrong modality."""
    ups = ups_of(2)
    query, rows = torch.randn(3, HEADS, HEAD_DIM).double(), torch.randn(9, WIDTH).double()
    visual = torch.arange(9) < 4
    got = paged.prefill(query, rows, torch.zeros(9, dtype=torch.bool), ups, SCALING)
    assert (got - reference(query, rows, visual, ups)).abs().max() > 0.1
