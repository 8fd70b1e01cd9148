"""The C++ kernel gives what its PyTorch specification gives in float32, to bfloat16's rounding."""

from dataclasses import replace

import pytest
import torch
from helpers import prompt_inputs, random_mla, set_attention

from mha2mla_vlm.model.absorbed import Up, absorb, attend, dense_mask, expand
from mha2mla_vlm.model.cache.quantization import dequantize
from mha2mla_vlm.model.cache.quantized import quantized_cache
from mha2mla_vlm.model.kernels import cpu_decode, find_kernel
from mha2mla_vlm.model.modality import TokenModality

pytestmark = pytest.mark.skipif(
    cpu_decode.library() is None, reason="needs a C++ compiler and AVX-512 BF16 (see the log)"
)
SHAPES = {  # query heads, KV heads, head dim, rope dims, latent dims
    "qwen2.5-vl-7b": (28, 4, 128, 32, 256),
    "qwen2.5-vl-7b at 32": (28, 4, 128, 32, 128),
    "llava-next-8b": (32, 8, 128, 32, 512),
    "llava-1.5-7b at 32": (32, 32, 128, 32, 1024),
    "odd": (6, 3, 64, 10, 37),
    "one head": (1, 1, 8, 2, 5),
    "no dims without rope": (4, 2, 16, 16, 24),
}
SCALING = 0.2


def case(shape, *, batch=1, new=1, total=150, modalities=2, bias=True, seed=0):
    """Random queries, up projections and tokens."""
    heads, groups, head_dim, rope_dim, rank = SHAPES[shape]
    nope = head_dim - rope_dim
    torch.manual_seed(seed)

    def normal(*size, scale=1.0):
        return (torch.randn(*size) * scale).bfloat16()

    ups = tuple(
        Up(
            normal(groups * (nope + head_dim), rank, scale=2 * rank**-0.5),
            normal(groups * (nope + head_dim)) if bias else None,
            groups,
            nope,
        )
        for _ in range(modalities)
    )
    queries = normal(batch, heads, new, rope_dim), normal(batch, heads, new, nope)
    return queries, ups, (normal(batch, total, rank), normal(batch, groups, total, rope_dim))


def visual_of(batch, total, start, stop):
    """A mask with one visual run, at another place in each row."""
    mask = torch.zeros(batch, total, dtype=torch.bool)
    for row in range(batch):
        mask[row, start + 3 * row : stop + 3 * row] = True
    return mask


def both(queries, ups, piece, visual, mask=None, filled=None, stored=None):
    """Outputs of the specification in float32, and of the kernel, over `stored` where it is given."""
    exact = [
        replace(up, weight=up.weight.float(), bias=None if up.bias is None else up.bias.float()) for up in ups
    ]
    shown = torch.zeros(piece[0].shape[:2], dtype=torch.bool) if visual is None else visual
    runs = TokenModality.from_mask(shown).runs
    absorbed = absorb(*(x.float() for x in queries), exact, SCALING)
    sums = attend(absorbed, tuple(x.float() for x in piece), runs, visual, mask)
    expected = expand(sums, exact, queries[0].shape[2])
    return expected, cpu_decode.decode(*queries, ups, SCALING, stored or piece, visual, mask, filled)


def assert_close(got, expected):
    """To 1% of the spread: results, weights and absorbed queries are rounded to 8 bits."""
    assert got.shape == expected.shape
    assert (got.float() - expected).abs().max() < 0.01 * expected.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("modalities", [1, 2])
def test_shapes(shape, modalities):
    queries, ups, piece = case(shape, modalities=modalities)
    expected, got = both(queries, ups, piece, visual_of(1, 150, 5, 100) if modalities == 2 else None)
    assert_close(got, expected)


@pytest.mark.parametrize("total", [1, 2, 15, 16, 17, 63, 64, 65, 129])
@pytest.mark.parametrize("bias", [False, True])
def test_lengths(total, bias):
    queries, ups, piece = case("odd", total=total, bias=bias)
    for start, stop in ((0, 0), (0, total), (total // 3, 2 * total // 3)):
        expected, got = both(queries, ups, piece, visual_of(1, total, start, stop))
        assert_close(got, expected)


def test_text_taken_for_visual_is_seen():
    """Negative control: the comparison sees a wrong modality."""
    queries, ups, piece = case("odd")
    expected, _ = both(queries, ups, piece, visual_of(1, 150, 5, 100))
    _, wrong = both(queries, ups, piece, visual_of(1, 150, 5, 130))
    with pytest.raises(AssertionError):
        assert_close(wrong, expected)


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_batches_with_padding_and_several_new_tokens(new, padded):
    queries, ups, piece = case("odd", batch=3, new=new)
    shown = torch.ones(3, 150, dtype=torch.long)
    shown[0, :120] = 0
    mask = dense_mask(shown if padded else None, new, 150, torch.device("cpu"))
    expected, got = both(queries, ups, piece, visual_of(3, 150, 5, 100), mask)
    assert_close(got, expected)


def test_views_of_larger_buffers_and_room_that_is_not_filled():
    queries, ups, (latent, k_rope) = case("odd", batch=2, total=200)
    visual = visual_of(2, 200, 5, 100)
    expected, got = both(queries, ups, (latent[:, :150], k_rope[:, :, :150]), visual[:, :150])
    assert_close(got, expected)
    filled = torch.tensor(150)
    latent[:, 150:] = torch.nan
    mask = dense_mask(None, 1, 200, torch.device("cpu"), filled)
    assert torch.equal(cpu_decode.decode(*queries, ups, SCALING, (latent, k_rope), visual, mask, filled), got)


def tokens_of(tokens):
    """Latents and rotated keys of a quantised layer, not rounded again."""
    pairs = zip(tokens.coded, tokens.recent, strict=True)
    first, second = (
        torch.cat([*([] if few is None else [dequantize(few, torch.float32)]), rest.float()], dim=2)
        for few, rest in pairs
    )
    return first[:, 0], second


@pytest.mark.parametrize("shape", ["odd", "qwen2.5-vl-7b", "llava-1.5-7b at 32"])
@pytest.mark.parametrize(("bits", "key_bits", "block"), [(8, 8, 64), (4, 4, 64), (2, 4, 128)])
def test_tokens_in_few_bits(shape, bits, key_bits, block):
    queries, ups, (latent, k_rope) = case(shape, batch=2, total=300)
    cache = quantized_cache(nbits=bits, rope_nbits=key_bits, q_group_size=block, residual_length=128)
    cache.update(latent[:, None], k_rope, 0)
    tokens = cache.layers[0].stored()
    assert tokens.coded[0].tokens == 256
    visual = visual_of(2, 300, 5, 200)
    shown = torch.ones(2, 300, dtype=torch.long)
    shown[0, :70] = 0
    mask = dense_mask(shown, 1, 300, torch.device("cpu"))
    assert cpu_decode.can_run(*queries, ups, tokens, mask)
    expected, got = both(queries, ups, tokens_of(tokens), visual, mask, stored=tokens)
    assert_close(got, expected)


def test_rows_and_lengths_of_a_quantised_cache():
    queries, ups, (latent, k_rope) = case("odd", batch=3, total=300)
    visual = visual_of(3, 300, 5, 200)
    cache = quantized_cache()
    cache.update(latent[:, None, :128], k_rope[:, :, :128], 0)
    cache.update(latent[:, None, 128:], k_rope[:, :, 128:], 0)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    for kept in (300, 250, 190, 128, 60):
        cache.crop(kept - cache.get_seq_length())
        tokens = cache.layers[0].stored()
        expected, got = both(queries, ups, tokens_of(tokens), visual[:, :kept], stored=tokens)
        assert_close(got, expected)


def test_few_bits_that_it_leaves_to_pytorch():
    queries, ups, (latent, k_rope) = case("odd", total=300)
    for config in ({"q_group_size": 32}, {"rope_nbits": 16}):
        cache = quantized_cache(**config)
        cache.update(latent[:, None], k_rope, 0)
        assert not cpu_decode.can_run(*queries, ups, cache.layers[0].stored(), None)


def test_calls_of_other_sizes_in_turn():
    """Memory is kept from call to call: a larger call must not take what fitted a smaller one."""
    for shape in ("one head", "llava-1.5-7b at 32", "odd", "llava-next-8b", "one head", "qwen2.5-vl-7b"):
        queries, ups, piece = case(shape)
        expected, got = both(queries, ups, piece, visual_of(1, 150, 5, 100))
        assert_close(got, expected)


def test_large_scores_do_not_overflow():
    queries, ups, piece = case("odd")
    expected, got = both(tuple(100 * x for x in queries), ups, piece, visual_of(1, 150, 5, 100))
    assert torch.isfinite(got).all()
    assert_close(got, expected)


def test_threads_give_the_same():
    queries, ups, piece = case("qwen2.5-vl-7b", total=300)
    threads = torch.get_num_threads()
    got = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        got.append(both(queries, ups, piece, visual_of(1, 300, 5, 200))[1])
    torch.set_num_threads(threads)
    assert_close(got[1], got[0].float())
    assert_close(got[2], got[0].float())


def test_only_what_it_can_take():
    queries, ups, piece = case("odd")
    assert find_kernel("auto", *queries, ups, piece, None) is cpu_decode.decode
    assert find_kernel("torch", *queries, ups, piece, None) is None
    added = torch.zeros(1, 1, 1, 150)
    assert find_kernel("auto", *queries, ups, piece, added) is None
    graded = queries[0].clone().requires_grad_()
    assert find_kernel("auto", graded, queries[1], ups, piece, None) is None
    with torch.no_grad():
        assert find_kernel("auto", graded, queries[1], ups, piece, None) is cpu_decode.decode
    assert find_kernel("auto", *(x.float() for x in queries), ups, piece, None) is None


def test_models_decode_alike(family):
    model, processor = random_mla(family)
    model = model.bfloat16()
    inputs = prompt_inputs(family, processor, ["two images", "text"])
    banned = list(model.visual_token_ids)
    options = {"max_new_tokens": 4, "suppress_tokens": banned, "do_sample": False}
    logits = {}
    for backend in ("torch", "cpp"):
        set_attention(model, decode_backend=backend)
        output = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        logits[backend] = torch.stack(output.logits[:2]).float()  # the second is of a decoded token
    assert (logits["cpp"] - logits["torch"]).abs().max() < 0.05 * logits["torch"].abs().max()
    assert not torch.equal(logits["cpp"], logits["torch"])  # the kernel was in use
