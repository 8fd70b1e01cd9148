"""The Triton kernel gives what its PyTorch specification gives; in Triton's interpreter without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ONE_FAST, prompt_inputs, random_mla, set_attention, shallow

from mha2mla_vlm.model.absorbed import Up, absorb, attend, dense_mask, expand
from mha2mla_vlm.model.modality import TokenModality

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {  # query heads, KV heads, head dim, rope dims, latent dims; of the models at d_kv = 32 or 64
    "qwen2.5-vl-7b": (28, 4, 128, 32, 256),
    "qwen2.5-vl-7b at 32": (28, 4, 128, 32, 128),
    "llava-next-8b": (32, 8, 128, 32, 512),
    "a KV head for each": (8, 8, 64, 16, 300),
    "odd": (6, 3, 16, 10, 37),
    "all dims rotated": (6, 3, 10, 10, 37),
    "one head": (1, 1, 4, 2, 5),
}
if DEVICE == "cuda":  # the interpreter takes half a minute for it
    SHAPES["llava-1.5-7b at 32"] = (32, 32, 128, 32, 1024)
CLOSE = {torch.float32: 1e-5, torch.float16: 3e-3}
if DEVICE == "cuda":  # the interpreter computes it wrongly
    CLOSE[torch.bfloat16] = 2e-2


def case(shape, *, batch=1, new=1, total=150, dtype=torch.float32, modalities=2, bias=True, seed=0):
    """Random queries, up projections and tokens."""
    heads, groups, head_dim, rope_dim, rank = SHAPES[shape]
    torch.manual_seed(seed)

    def normal(*size, scale=1.0):
        return (torch.randn(*size) * scale).to(DEVICE, dtype)

    nope, rows = head_dim - rope_dim, groups * (2 * head_dim - rope_dim)
    ups = [
        Up(normal(rows, rank, scale=rank**-0.5), normal(rows) if bias else None, groups, nope)
        for _ in range(modalities)
    ]
    queries = [normal(batch, heads, new, dims) for dims in (rope_dim, nope)]
    return queries, ups, (normal(batch, total, rank), normal(batch, groups, total, rope_dim))


def both(made, visual, mask=None, filled=None):
    """Outputs of the specification, in float32, and of the kernel."""
    from mha2mla_vlm.model.kernels import triton_decode

    queries, ups, piece = made
    given = torch.zeros(*piece[0].shape[:2], dtype=torch.bool) if visual is None else visual
    exact, float_piece = [up.float() for up in ups], tuple(x.float() for x in piece)
    runs, scaling = TokenModality.from_mask(given).runs, sum(q.shape[-1] for q in queries) ** -0.5
    sums = attend(absorb(*(q.float() for q in queries), exact, scaling), float_piece, runs, visual, mask)
    assert triton_decode.can_run(*queries, ups, piece)
    got = triton_decode.decode(*queries, ups, scaling, piece, visual, mask, filled)
    return expand(sums, exact, queries[0].shape[2]), got


def assert_same(expected, got, dtype=torch.float32):
    torch.testing.assert_close(got.float(), expected, atol=CLOSE[dtype], rtol=CLOSE[dtype])


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
    expected, got = both(case(shape, dtype=dtype), visual_of(1, 150, (5, 100)))
    assert_same(expected, got, dtype)
    assert got.dtype == dtype


@pytest.mark.parametrize("total", [1, 2, 127, 128, 129, 300])
@pytest.mark.parametrize("place", ["none", "all", "middle", "many"])
def test_lengths_and_places_of_visual_tokens(total, place):
    runs = {
        "none": [],
        "all": [(0, total)],
        "middle": [(total // 3, 2 * total // 3)],
        "many": [(at, at + 2) for at in range(0, total, 5)],
    }[place]
    made = case("odd", total=total)
    expected, got = both(made, visual_of(1, total, *runs))
    assert_same(expected, got)


def test_text_taken_for_visual_is_seen():
    """Negative control: the comparison sees a wrong modality."""
    made = case("odd")
    expected, _ = both(made, visual_of(1, 150, (5, 100)))
    _, wrong = both(made, visual_of(1, 150, (5, 101)))
    with pytest.raises(AssertionError):
        assert_same(expected, wrong)


@pytest.mark.parametrize("shape", ["odd", "qwen2.5-vl-7b at 32"])
def test_rows_of_a_batch_differ(shape):
    made = case(shape, batch=3)
    expected, got = both(made, visual_of(3, 150, (5, 60), (80, 120)))
    assert_same(expected, got)


@pytest.mark.parametrize("bias", [False, True])
def test_one_modality(bias):
    made = case("odd", batch=2, modalities=1, bias=bias)
    expected, got = both(made, None)
    assert_same(expected, got)


@pytest.mark.parametrize("kind", ["bool", "added", "padding"])
@pytest.mark.parametrize("new", [1, 4])
def test_masks(kind, new):
    made = case("odd", batch=2, new=new)
    shown = torch.ones(2, 150, dtype=torch.long, device=DEVICE)
    shown[0, :140] = 0
    mask = dense_mask(None if kind == "bool" else shown, new, 150, DEVICE)
    if kind == "added":
        mask = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected, got = both(made, visual_of(2, 150, (5, 100)), mask)
    assert_same(expected, got)


def test_room_that_is_not_filled_is_not_read():
    made = case("odd")
    filled = torch.tensor(70, device=DEVICE)
    mask = dense_mask(None, 1, 150, DEVICE, filled)
    visual = visual_of(1, 150, (5, 100))
    expected, _ = both(made, visual, mask)
    for tensor in (made[2][0], made[2][1].transpose(1, 2)):
        tensor[:, 70:] = torch.nan
    _, got = both(made, visual, mask, filled)
    assert_same(expected, got)


def test_views_of_larger_buffers():
    queries, ups, (latent, k_rope) = case("odd", batch=2, total=200)
    views = latent[:, :150], k_rope[:, :, :150]
    visual = visual_of(2, 200, (5, 100))[:, :150]
    expected, got = both((queries, ups, views), visual)
    assert_same(expected, got)


@ONE_FAST
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
    assert all(each["registers"] and each["shared"] <= 227 * 1024 for each in needed), needed
