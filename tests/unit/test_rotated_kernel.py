"""The Triton kernel for keys rotated at read gives what its PyTorch specification gives; in the interpreter
without a GPU.
"""

import pytest
import torch
from helpers import logits_of_backends, prompt_inputs, random_mla, shallow
from test_kernels import CLOSE, DEVICE, assert_same, visual_of

from mha2mla_vlm.model.absorbed import Up, absorb, attend_pieces, dense_mask, expand
from mha2mla_vlm.model.modality import TokenModality
from mha2mla_vlm.model.rebuilt import Angles, Rebuilt

pytest.importorskip("triton")
SHAPES = {  # query heads, KV heads, head dim, rope dims, latent dims
    "qwen2.5-vl-7b": (28, 4, 128, 128, 124),
    "llava-next-8b": (32, 8, 128, 128, 256),
    "mha, some dims": (4, 4, 64, 16, 300),
    "qwen2.5-vl-7b, some dims": (28, 4, 128, 32, 124),
    "odd": (6, 3, 12, 10, 37),
    "all of them": (6, 3, 10, 10, 37),
    "one head": (1, 1, 4, 2, 5),
}


def case(shape, *, batch=1, new=1, total=150, dtype=torch.float32, modalities=2, bias=True):
    """Random queries, and tokens whose keys are made of latents."""
    heads, kv_heads, head_dim, rope_dim, rank = SHAPES[shape]
    torch.manual_seed(0)

    def normal(*size, scale=1.0):
        return (torch.randn(*size) * scale).to(DEVICE, dtype)

    outputs, nope = kv_heads * 2 * head_dim, head_dim - rope_dim
    ups = [
        Up(
            normal(outputs, rank, scale=rank**-0.5),
            normal(outputs) if bias else None,
            kv_heads,
            nope,
            rope_dim,
        )
        for _ in range(modalities)
    ]
    turns = torch.rand(batch, total, head_dim // 2, device=DEVICE) * 6
    tables = [torch.cat([x, x], dim=-1).to(dtype) for x in (turns.cos(), turns.sin())]
    pairs = [torch.randperm(head_dim // 2)[: rope_dim // 2] for _ in range(kv_heads)]
    if rope_dim == head_dim:
        pairs = [torch.arange(head_dim // 2)] * kv_heads  # as `check_pairs` demands
    angles = Angles(*tables, torch.stack(pairs).to(DEVICE))
    queries = [normal(batch, heads, new, dims) for dims in (rope_dim, nope)]
    return queries, ups, (normal(batch, total, rank), None), angles


def both(made, visual, mask=None, filled=None):
    """Outputs of the specification, in float32, and of the kernel."""
    from mha2mla_vlm.model.kernels import triton_rotated

    queries, ups, piece, angles = made
    given = torch.zeros(*piece[0].shape[:2], dtype=torch.bool) if visual is None else visual
    runs, scaling = TokenModality.from_mask(given).runs, queries[0].shape[-1] ** -0.5
    exact = [up.float() for up in ups]
    tables = Angles(angles.cos.float(), angles.sin.float(), angles.pairs)
    stored = Rebuilt((piece[0].float(), None), exact, runs, visual, tables)
    sums = attend_pieces(absorb(*(q.float() for q in queries), exact, scaling), stored, runs, visual, mask)
    stored = Rebuilt(piece, ups, runs, visual, angles)
    assert triton_rotated.can_run(*queries, ups, stored)
    got = triton_rotated.decode(*queries, ups, scaling, stored, visual, mask, filled)
    return expand(sums, exact, queries[0].shape[2]), got


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype):
    expected, got = both(case(shape, dtype=dtype), visual_of(1, 150, (5, 100)))
    assert_same(expected, got, dtype)
    assert got.dtype == dtype


@pytest.mark.parametrize("total", [1, 64, 65, 300])
def test_lengths(total):
    assert_same(*both(case("odd", total=total), visual_of(1, total, (total // 3, 2 * total // 3))))


def test_another_turn_is_seen():
    """Negative control: the comparison sees a wrong angle."""
    made, wrong = case("odd"), case("odd")
    wrong[-1].cos[:, 70] += 0.1
    with pytest.raises(AssertionError):
        assert_same(both(made, None)[0], both(wrong, None)[1])


def test_rows_of_a_batch_differ():
    assert_same(*both(case("odd", batch=3), visual_of(3, 150, (5, 60), (80, 120))))


@pytest.mark.parametrize("bias", [False, True])
def test_one_modality(bias):
    expected, got = both(case("odd", batch=2, modalities=1, bias=bias), None)
    assert_same(expected, got)


@pytest.mark.parametrize("new", [1, 4])
def test_masks_and_room_that_is_not_filled(new):
    shown = torch.ones(2, 150, dtype=torch.long, device=DEVICE)
    shown[0, :40] = 0
    filled = torch.tensor(100, device=DEVICE)
    mask = dense_mask(shown, new, 150, DEVICE, filled)
    assert_same(*both(case("odd", batch=2, new=new), visual_of(2, 150, (5, 60)), mask, filled))


def test_a_model_decodes_with_it(family):
    model, processor = random_mla(family, rotate_at="read", rope_dim=32)
    model = shallow(model).to(DEVICE)
    inputs = {k: v.to(DEVICE) for k, v in prompt_inputs(family, processor, ["image"]).items()}
    expected, got = logits_of_backends(model, inputs, "torch", "triton")
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
