"""The C++ kernel for keys rotated at read gives what its specification gives in float32, on any CPU."""

from dataclasses import replace

import pytest
import torch
from helpers import prompt_inputs, random_mla, set_attention, shallow
from test_interpolated import DIM, RUNS, TOKENS, rotation_of

from mha2mla_vlm.algorithms.rounding import rounded
from mha2mla_vlm.config import LatentBits
from mha2mla_vlm.model import interpolated
from mha2mla_vlm.model.absorbed import Up, absorb, attend_pieces, dense_mask, expand
from mha2mla_vlm.model.cache.packed import PackedTokens, pack
from mha2mla_vlm.model.cache.pages import PackedRows, Paged, store, store_bytes
from mha2mla_vlm.model.kernels import cpu_rotated, find_kernel
from mha2mla_vlm.model.modality import Kind, Run, TokenModality
from mha2mla_vlm.model.rebuilt import Angles, Rebuilt

pytestmark = pytest.mark.skipif(cpu_rotated.library() is None, reason="needs a C++ compiler (see the log)")
SHAPES = {  # query heads, KV heads, head dim, rope dims, latent dims
    "qwen2.5-vl-7b": (28, 4, 128, 128, 127),
    "llava-next-8b, some dims": (32, 8, 128, 32, 255),
    "mha": (3, 3, 128, 128, 70),
    "odd": (6, 3, 12, 10, 37),
    "all of them": (6, 3, 10, 10, 37),
    "one head": (1, 1, 4, 2, 5),
}
SCALING = 0.1
LOSS = {torch.float32: 2e-5, torch.bfloat16: 5e-3}  # of the largest output; results are rounded


def case(shape, *, batch=1, new=1, total=150, dtype=torch.float32, modalities=2, bias=True, rotation=None):
    """Random queries, and tokens whose keys are made of latents."""
    heads, kv_heads, head_dim, rope_dim, rank = SHAPES[shape]
    torch.manual_seed(0)

    def normal(*size, scale=1.0):
        return (torch.randn(*size) * scale).to(dtype)

    outputs, sizes = kv_heads * 2 * head_dim, (kv_heads, head_dim - rope_dim, rope_dim)
    ups = [
        Up(normal(outputs, rank, scale=rank**-0.5), normal(outputs) if bias else None, *sizes)
        for _ in range(modalities)
    ]
    queries = [normal(batch, heads, new, dims) for dims in (rope_dim, head_dim - rope_dim)]
    pairs = torch.stack([torch.randperm(head_dim // 2)[: rope_dim // 2].sort()[0] for _ in range(kv_heads)])
    if rotation is None:
        turns = torch.rand(batch, total, head_dim // 2) * 6
        angles = Angles(*(torch.cat([x, x], dim=-1) for x in (turns.cos(), turns.sin())), pairs)
    else:
        angles = Angles.of(rotation, pairs)
    return queries, ups, normal(batch, total, rank), angles


def visual_of(batch, total, start, stop):
    """A mask with one visual run, at another place in each row."""
    mask = torch.zeros(batch, total, dtype=torch.bool)
    for row in range(batch):
        mask[row, start + 3 * row : stop + 3 * row] = True
    return mask


def both(made, visual, mask=None, filled=None):
    """Outputs of the specification, in float32 and with all keys made, and of the kernel."""
    queries, ups, latent, angles = made
    shown = torch.zeros(latent.shape[:2], dtype=torch.bool) if visual is None else visual
    runs, exact = TokenModality.from_mask(shown).runs, [up.float() for up in ups]
    tables = Angles(angles.cos.float(), angles.sin.float(), angles.pairs)
    stored = Rebuilt((latent.float().nan_to_num(), None), exact, runs, visual, tables)
    absorbed = absorb(*(q.float() for q in queries), exact, SCALING)
    expected = expand(attend_pieces(absorbed, stored, runs, visual, mask), exact, queries[0].shape[2])
    stored = Rebuilt((latent, None), ups, runs, visual, angles)
    return expected, cpu_rotated.decode(*queries, ups, SCALING, stored, visual, mask, filled)


def assert_close(got, expected, dtype=torch.float32):
    assert got.shape == expected.shape
    assert got.dtype == dtype
    assert (got.float() - expected).abs().max() < LOSS[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", LOSS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype):
    expected, got = both(case(shape, dtype=dtype), visual_of(1, 150, 5, 100))
    assert_close(got, expected, dtype)


@pytest.mark.parametrize("dtype", LOSS, ids=str)
@pytest.mark.parametrize(
    ("shape", "batch", "new"),
    [("qwen2.5-vl-7b", 1, 1), ("qwen2.5-vl-7b", 2, 2), ("llava-next-8b, some dims", 1, 1), ("mha", 2, 1)],
)
def test_turns_are_interpolated_within_blocks(family, shape, batch, new, dtype):
    rotation = rotation_of(family, batch)
    made = case(shape, batch=batch, new=new, total=TOKENS, dtype=dtype, rotation=rotation)
    visual = torch.zeros(batch, TOKENS, dtype=torch.bool)
    for start, stop, kind in RUNS:
        visual[:, start:stop] = kind == Kind.VISION
    shown = torch.ones(batch, TOKENS, dtype=torch.long)
    shown[0, :700] = 0
    mask = dense_mask(shown if batch > 1 else None, new, TOKENS, torch.device("cpu"))
    assert_close(both(made, visual, mask)[1], both(made, visual, mask)[0], dtype)
    plan = next(plan for key, plan in rotation.plans.items() if key[-1] == cpu_rotated.WIDTH)
    # interleaved pairs of every axis turn fast, which float32 sees where few rows share what is absorbed
    too_fast = (family, shape, dtype) == ("qwen3_vl", "llava-next-8b, some dims", torch.float32)
    assert any(some.terms for some in plan or ()) != too_fast


@pytest.mark.parametrize("dtype", LOSS, ids=str)
@pytest.mark.parametrize("shape", ["qwen2.5-vl-7b", "mha"])
def test_turns_are_interpolated_where_modalities_are_mixed(shape, dtype):
    """As in a batch whose images are at other places."""
    rotation = rotation_of("qwen2_5_vl", 2)
    made = case(shape, batch=2, total=TOKENS, dtype=dtype, rotation=rotation)
    visual = torch.zeros(2, TOKENS, dtype=torch.bool)
    visual[0, 30 : TOKENS // 2] = visual[1, TOKENS // 2 + 7 : -50] = True
    expected, got = both(made, visual)
    assert_close(got, expected, dtype)
    plan = next(plan for key, plan in rotation.plans.items() if key[-1] == cpu_rotated.WIDTH)
    assert any(some.terms and some.kind == Kind.MIXED for some in plan)


@pytest.mark.parametrize("total", [1, 63, 64, 65, 129, 300])
def test_lengths(total):
    for start, stop in ((0, 0), (0, total), (total // 3, 2 * total // 3)):
        expected, got = both(case("odd", total=total), visual_of(1, total, start, stop))
        assert_close(got, expected)


def test_another_turn_is_seen():
    """Negative control: the comparison sees a wrong angle."""
    made, wrong = case("odd"), case("odd")
    wrong[-1].cos[:, 70] += 0.5
    with pytest.raises(AssertionError):
        assert_close(both(wrong, None)[1], both(made, None)[0])


@pytest.mark.parametrize("dtype", LOSS, ids=str)
def test_rows_of_a_batch_differ(dtype):
    expected, got = both(case("odd", batch=3, dtype=dtype), visual_of(3, 150, 5, 60))
    assert_close(got, expected, dtype)


@pytest.mark.parametrize("bias", [False, True])
def test_one_modality(bias):
    expected, got = both(case("odd", batch=2, modalities=1, bias=bias), None)
    assert_close(got, expected)


@pytest.mark.parametrize("new", [1, 4])
def test_masks_and_room_that_is_not_filled(new):
    shown = torch.ones(2, 150, dtype=torch.long)
    shown[0, :70] = 0
    filled = torch.tensor(100)
    mask = dense_mask(shown, new, 150, torch.device("cpu"), filled)
    made = case("odd", batch=2, new=new)
    made[2][:, 100:] = torch.nan
    expected, got = both(made, visual_of(2, 150, 5, 60), mask, filled)
    assert_close(got, expected)


@pytest.mark.parametrize("dtype", LOSS, ids=str)
def test_nan_stays(dtype):
    made = case("odd", dtype=dtype)
    made[2][0, 70, 3] = torch.nan
    assert both(made, None)[1].isnan().any()


def test_what_is_left_to_pytorch():
    queries, ups, latent, angles = case("odd")
    runs = TokenModality.from_mask(torch.zeros(1, 150, dtype=torch.bool)).runs

    def found(backend="auto", q=queries, stored=latent, up=ups, mask=None):
        return find_kernel(backend, *q, up, Rebuilt((stored, None), up, runs, None, angles), mask)

    assert found() is found("cpp") is cpu_rotated.decode
    assert found("torch") is None
    assert found(q=[x.clone().requires_grad_() for x in queries]) is None
    assert found(q=[x.half() for x in queries]) is None
    assert found(mask=torch.zeros(1, 1, 1, 150)) is None
    assert found(up=[replace(up, weight=up.weight.t().contiguous().t()) for up in ups]) is None


def test_a_model_decodes_with_it(monkeypatch, family):
    model, processor = random_mla(family, rotate_at="read", rope_dim=32)
    model, inputs = shallow(model), prompt_inputs(family, processor, ["image"])
    calls, attend = [], cpu_rotated.attend
    monkeypatch.setattr(cpu_rotated, "attend", lambda *x: calls.append(x) or attend(*x))
    logits = []
    for backend in ("torch", "auto"):
        monkeypatch.setattr(interpolated, "BLOCK", 0)
        set_attention(model, decode_backend=backend)
        options = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
        logits.append(torch.stack(model.generate(**inputs, **options).logits))
        assert bool(calls) == (backend == "auto")
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)


def test_head_dims_are_those_of_the_rotation():
    """So that layers which rotate all of them share a plan."""
    assert Angles.of(rotation_of("qwen2_5_vl"), torch.arange(64)[None]).dims == DIM


def test_tables_may_have_room_for_more_tokens():
    """As those of pages have, which serving engines fill."""
    queries, ups, latent, angles = case("mha")
    expected, got = both((queries, ups, latent[:, :100], angles), visual_of(1, 100, 5, 60))
    assert_close(got, expected)


@pytest.mark.parametrize("dtype", LOSS, ids=str)
@pytest.mark.parametrize("bits", [(4, 9, 16, 8), (0, 37, 0, 0), (0, 1, 2, 4), (37, 0, 0, 0)], ids=str)
def test_rows_of_bytes_are_read_as_they_are(bits, dtype):
    """Bit-identical to the same latents as numbers."""
    bits = LatentBits(*bits)
    queries, ups, latent, angles = case("odd", batch=2, dtype=dtype)
    ups = [replace(up, weight=up.weight[:, : bits.rank].contiguous()) for up in ups]
    latent = rounded(latent[..., : bits.rank] * torch.logspace(-6, 5, bits.rank).to(dtype), bits)
    visual = visual_of(2, 150, 5, 100)
    runs = TokenModality.from_mask(visual).runs
    rows = torch.nn.functional.pad(pack(latent, bits), (0, 3))[..., : bits.row_bytes]  # of wider rows
    found = []
    for held in ((latent, None), PackedTokens(rows, latent.new_empty(2, 3, 150, 0), bits, dtype)):
        stored = Rebuilt(held, ups, runs, visual, angles)
        assert cpu_rotated.can_run(*queries, ups, stored, None)
        found.append(cpu_rotated.decode(*queries, ups, SCALING, stored, visual))
    assert torch.equal(*found)
    assert found[0].isfinite().all()


@pytest.mark.parametrize("size", [16, 100])
@pytest.mark.parametrize("bits", [None, (4, 9, 16, 8)], ids=str)
def test_pages_are_read_as_they_are(bits, size):
    """As the same tokens in one tensor, of requests of other lengths."""
    queries, ups, latent, angles = case("odd", batch=2, total=300)
    visual, lengths = visual_of(2, 200, 70, 150), torch.tensor([200, 131])
    packed = None if bits is None else PackedRows(bits=LatentBits(*bits), rope=0)
    latent = latent[:, :200]
    rows, held = latent, (latent, None)
    if packed is not None:
        latent = rounded(latent * torch.logspace(-6, 5, 37), packed.bits)
        rows = pack(latent, packed.bits)
        held = PackedTokens(rows, latent.new_empty(2, 3, 200, 0), packed.bits, latent.dtype)
    table = torch.randperm(2 * -(-200 // size) + 1)[:-1].view(2, -1)
    pages = torch.full((table.numel() + 1, size, 40), torch.nan)  # rows are wider, as where positions follow
    for row, length in enumerate(lengths.tolist()):
        token = torch.arange(length)
        slots = table[row, token // size] * size + token % size
        if packed is None:
            store(pages, slots, rows[row, :length], None, 37)
        else:
            store_bytes(pages, slots, rows[row, :length])
    mask = (torch.arange(200) < lengths[:, None])[:, None, None]
    mixed = (Run(0, 200, Kind.MIXED),)
    expected = cpu_rotated.decode(
        *queries, ups, SCALING, Rebuilt(held, ups, mixed, visual, angles), visual, mask
    )
    stored = Rebuilt(Paged(pages, table, lengths, 37, 3, packed), ups, mixed, visual, angles)
    assert cpu_rotated.can_run(*queries, ups, stored, None)
    room = torch.nn.functional.pad(visual, (0, stored.length - 200))
    got = cpu_rotated.decode(*queries, ups, SCALING, stored, room)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
