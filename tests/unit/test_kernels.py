"""The Triton kernel gives what its PyTorch specification gives; in Triton's interpreter without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import prompt_inputs, random_mla, set_attention, shallow

from mha2mla_vlm.model.absorbed import Queries, attend, dense_mask
from mha2mla_vlm.model.modality import TokenModality

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {  # query heads, KV heads, rope dims, latent dims; of the models at d_kv = 32 or 64
    "qwen2.5-vl-7b": (28, 4, 32, 256),
    "qwen2.5-vl-7b at 32": (28, 4, 32, 128),
    "llava-next-8b": (32, 8, 32, 512),
    "llava-1.5-7b at 32": (32, 32, 32, 1024),
    "odd": (6, 3, 10, 37),
    "one head": (1, 1, 2, 5),
}
CLOSE = {torch.float32: 1e-5, torch.float16: 3e-3}
if DEVICE == "cuda":  # the interpreter computes it wrongly
    CLOSE[torch.bfloat16] = 2e-2


def case(shape, *, batch=1, new=1, total=150, dtype=torch.float32, modalities=2, bias=True, seed=0):
    """Random queries and tokens."""
    heads, groups, rope_dim, rank = SHAPES[shape]
    torch.manual_seed(seed)

    def normal(*size, scale=1.0):
        return (torch.randn(*size) * scale).to(DEVICE, dtype)

    rows = heads * new
    queries = Queries(
        normal(batch, groups, rows // groups, rope_dim, scale=rope_dim**-0.5),
        tuple(normal(batch, rows, rank, scale=2 * rank**-0.5) for _ in range(modalities)),
        normal(batch, rows, 1) if bias and modalities == 2 else None,
    )
    return queries, (normal(batch, total, rank), normal(batch, groups, total, rope_dim))


def both(queries, piece, visual, mask=None, filled=None):
    """Sums of the specification, in float32, and of the kernel."""
    from mha2mla_vlm.model.kernels import triton_decode

    modality = TokenModality.from_mask(
        torch.zeros(len(piece[0]), piece[0].shape[1], dtype=torch.bool) if visual is None else visual
    )
    exact = Queries(
        queries.rope.float(),
        tuple(x.float() for x in queries.latent),
        None if queries.text_constant is None else queries.text_constant.float(),
    )
    float_piece = tuple(x.float() for x in piece)
    return (
        attend(exact, float_piece, modality.runs, visual, mask),
        triton_decode.attend(queries, piece, visual, mask, filled),
    )


def assert_same(expected, got, dtype=torch.float32):
    tolerance = {"atol": CLOSE[dtype], "rtol": CLOSE[dtype]}
    for name, (right, mine) in enumerate(zip(expected.latent, got.latent, strict=True)):
        right = torch.zeros_like(mine) if right is None else right
        torch.testing.assert_close(
            mine.float(), right.float(), **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    if expected.text_mass is not None:
        torch.testing.assert_close(got.text_mass.float(), expected.text_mass.float(), **tolerance)


def visual_of(batch, total, *runs):
    """A mask in which the tokens of these runs are visual; later rows are shifted, so that rows differ."""
    mask = torch.zeros(batch, total, dtype=torch.bool)
    for start, stop in runs:
        for row in range(batch):
            mask[row, start + 3 * row : stop + 3 * row] = True
    return mask.to(DEVICE)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype):
    queries, piece = case(shape, dtype=dtype)
    expected, got = both(queries, piece, visual_of(1, 150, (5, 100)))
    assert_same(expected, got, dtype)
    assert got.latent[0].dtype == dtype


@pytest.mark.parametrize("total", [1, 2, 127, 128, 129, 300])
@pytest.mark.parametrize("place", ["none", "all", "middle", "many"])
def test_lengths_and_places_of_visual_tokens(total, place):
    runs = {
        "none": [],
        "all": [(0, total)],
        "middle": [(total // 3, 2 * total // 3)],
        "many": [(at, at + 2) for at in range(0, total, 5)],
    }[place]
    queries, piece = case("odd", total=total)
    expected, got = both(queries, piece, visual_of(1, total, *runs))
    assert_same(expected, got)


def test_text_taken_for_visual_is_seen():
    """Negative control: the comparison sees a wrong modality."""
    queries, piece = case("odd")
    expected, _ = both(queries, piece, visual_of(1, 150, (5, 100)))
    _, wrong = both(queries, piece, visual_of(1, 150, (5, 101)))
    with pytest.raises(AssertionError):
        assert_same(expected, wrong)


@pytest.mark.parametrize("shape", ["odd", "qwen2.5-vl-7b at 32"])
def test_rows_of_a_batch_differ(shape):
    queries, piece = case(shape, batch=3)
    expected, got = both(queries, piece, visual_of(3, 150, (5, 60), (80, 120)))
    assert_same(expected, got)


@pytest.mark.parametrize("bias", [False, True])
def test_one_modality(bias):
    queries, piece = case("odd", batch=2, modalities=1, bias=bias)
    expected, got = both(queries, piece, None)
    assert_same(expected, got)
    assert got.text_mass is None


@pytest.mark.parametrize("kind", ["bool", "added", "padding"])
@pytest.mark.parametrize("new", [1, 4])
def test_masks(kind, new):
    queries, piece = case("odd", batch=2, new=new)
    shown = torch.ones(2, 150, dtype=torch.long, device=DEVICE)
    shown[0, :140] = 0
    mask = dense_mask(None if kind == "bool" else shown, new, 150, DEVICE)
    if kind == "added":
        mask = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected, got = both(queries, piece, visual_of(2, 150, (5, 100)), mask)
    assert_same(expected, got)


def test_room_that_is_not_filled_is_not_read():
    queries, piece = case("odd")
    filled = torch.tensor(70, device=DEVICE)
    mask = dense_mask(None, 1, 150, DEVICE, filled)
    visual = visual_of(1, 150, (5, 100))
    expected, _ = both(queries, piece, visual, mask)
    for tensor in (piece[0], piece[1].transpose(1, 2)):
        tensor[:, 70:] = torch.nan
    _, got = both(queries, piece, visual, mask, filled)
    assert_same(expected, got)


def test_views_of_larger_buffers():
    queries, (latent, k_rope) = case("odd", batch=2, total=200)
    views = latent[:, :150], k_rope[:, :, :150]
    visual = visual_of(2, 200, (5, 100))[:, :150]
    expected, got = both(queries, views, visual)
    assert_same(expected, got)


@pytest.mark.parametrize("modalities", [("shared",), ("text", "vision")])
@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_models_decode_alike(family, modalities, how):
    model, processor = random_mla(family, modalities=modalities)
    model = shallow(model).to(DEVICE)
    inputs = {k: v.to(DEVICE) for k, v in prompt_inputs(family, processor, ["two images", "text"]).items()}
    options = {
        "max_new_tokens": 3,
        "do_sample": False,
        "suppress_tokens": list(model.visual_token_ids),
        **how,
    }
    expected = model.generate(**inputs, **options)
    set_attention(model, decode_backend="triton")
    assert torch.equal(model.generate(**inputs, **options), expected)


def test_compiles_for_an_h200_and_fits_its_shared_memory():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "processes" / "compile_triton.py"
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    needed = json.loads(result.stdout)
    assert all(0 < size <= 227 * 1024 for size in needed), needed
