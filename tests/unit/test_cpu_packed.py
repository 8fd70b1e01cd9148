"""The C++ kernel over rows of bytes, whose channels differ in bits, in growing tensors and in pages."""

import pytest
import torch
from helpers import logits_of_backends, prompt_inputs, random_mla
from test_cpu_kernel import SHAPES, assert_close, both, case, pytestmark, visual_of

from mha2mla_vlm.algorithms.rounding import rounded
from mha2mla_vlm.config import LatentBits
from mha2mla_vlm.model.absorbed import dense_mask
from mha2mla_vlm.model.cache.packed import PackedTokens, pack
from mha2mla_vlm.model.cache.pages import PackedRows, Paged, store_bytes
from mha2mla_vlm.model.kernels import cpu_decode

__all__ = ["pytestmark"]
BITS = {  # channels in 16, 8, 4 and 2 bits
    "odd": [(3, 26, 4, 4), (37, 0, 0, 0), (0, 37, 0, 0), (1, 0, 0, 36), (5, 2, 30, 0)],
    "one head": [(1, 0, 4, 0), (5, 0, 0, 0)],
    "qwen2.5-vl-7b": [(32, 96, 64, 64), (16, 0, 240, 0)],
    "llava-1.5-7b at 32": [(8, 200, 416, 400)],
    "no dims without rope": [(2, 4, 6, 12)],
}
CASES = [(shape, bits) for shape, some in BITS.items() for bits in some]


def packed_case(shape, bits, *, batch=2, total=150, new=1):
    """Queries and up projections as `case` gives them, and rounded tokens in rows of bytes."""
    queries, ups, (latent, k_rope) = case(shape, batch=batch, total=total, new=new)
    ups = [type(up)(up.weight / 40, up.bias, up.kv_heads, up.nope_dim) for up in ups]
    bits = LatentBits(*bits)
    rows = pack(rounded(latent.float() * 40, bits), bits)
    return queries, ups, PackedTokens(rows, (k_rope * 30).round().to(torch.int8), bits, torch.bfloat16)


@pytest.mark.parametrize(("shape", "bits"), CASES, ids=str)
def test_rows_of_bytes(shape, bits):
    queries, ups, tokens = packed_case(shape, bits)
    assert tokens.bits.rank == SHAPES[shape][4]
    assert cpu_decode.can_run(*queries, ups, tokens, None)
    queries = queries[0] / 30, queries[1]
    expected, got = both(queries, ups, tokens.whole(), visual_of(2, 150, 5, 100), stored=tokens)
    assert_close(got, expected)


def test_part_of_a_larger_buffer_with_masks_and_several_new_tokens():
    queries, ups, tokens = packed_case("odd", BITS["odd"][0], total=200, new=3)
    queries = queries[0] / 30, queries[1]
    shown = torch.ones(2, 150, dtype=torch.long)
    shown[0, :70] = 0
    mask = dense_mask(shown, 3, 150, torch.device("cpu"))
    part = PackedTokens(tokens.rows[:, :150], tokens.k_rope[:, :, :150], tokens.bits, tokens.dtype)
    expected, got = both(queries, ups, part.whole(), visual_of(2, 150, 5, 100), mask, stored=part)
    assert_close(got, expected)


def test_other_dtypes_are_left_to_pytorch():
    queries, ups, tokens = packed_case("odd", BITS["odd"][0])
    other = PackedTokens(tokens.rows, tokens.k_rope, tokens.bits, torch.float32)
    assert not cpu_decode.can_run(*queries, ups, other, None)


def paged(tokens, size=64):
    """The same tokens in shuffled pages, a third of which belong to nobody."""
    batch, total, _ = tokens.rows.shape
    kv_heads = tokens.k_rope.shape[1]
    layout = PackedRows(bits=tokens.bits, rope=kv_heads * tokens.k_rope.shape[-1])
    count = -(-total // size)
    table = torch.randperm(batch * count + count)[: batch * count].view(batch, count)
    pages = torch.full((batch * count + count, size, layout.width(torch.bfloat16) + 4), torch.nan).bfloat16()
    for row in range(batch):
        keys = tokens.k_rope[row].transpose(0, 1).flatten(1).view(torch.uint8)
        rows = torch.cat([tokens.rows[row], keys], dim=-1)
        places = torch.arange(total)
        store_bytes(pages, table[row, places // size] * size + places % size, rows)
    return Paged(pages, table, torch.full((batch,), total), tokens.bits.rank, kv_heads, layout)


@pytest.mark.parametrize(("shape", "bits"), [CASES[0], CASES[3], CASES[7]], ids=str)
def test_rows_of_bytes_in_pages(shape, bits):
    queries, ups, tokens = packed_case(shape, bits)
    queries = queries[0] / 30, queries[1]
    stored, visual = paged(tokens), visual_of(2, 150, 5, 100)
    room = torch.nn.functional.pad(visual, (0, stored.room - 150))
    assert cpu_decode.can_run(*queries, ups, stored, None)
    expected, got = both(queries, ups, tokens.whole(), visual, stored=tokens)
    assert_close(got, expected)
    assert torch.equal(cpu_decode.decode(*queries, ups, 0.2, stored, room), got)


def test_models_decode_over_them(family):
    model, processor = random_mla(family, bits=(4, 8, 12, 16))
    inputs = prompt_inputs(family, processor, ["two images", "text"])
    expected, got = logits_of_backends(model.bfloat16(), inputs, "torch", "cpp")
    assert (got - expected).norm() < 0.05 * expected.norm()  # a flip of a rounding shows in single logits
    assert not torch.equal(got, expected)  # the kernel was in use
