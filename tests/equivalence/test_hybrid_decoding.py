"""How models with layers of several kinds decode: kernels, and compiled steps over a static cache."""

import pytest
import torch
from helpers import greedy, logits_of_backends, prompt_inputs, random_mla
from transformers import CompileConfig

from mha2mla_vlm.model.kernels import HAS_TRITON

SMALL = {"rope_dim": 8, "rank": 20}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "backend",
    ["cpp", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="no Triton here"))],
)
def test_kernels_decode_as_pytorch_does(name, rotate_at, backend):
    model, processor = random_mla(name, **SMALL, rotate_at=rotate_at)
    inputs = prompt_inputs(name, processor, ["image"])
    expected, got = logits_of_backends(model, inputs, "torch", backend)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rotate_at", ["write", pytest.param("read", marks=slow)])
def test_a_static_cache_decodes_compiled(name, rotate_at):
    """One graph for all tokens behind a prompt, as `generate` compiles it on a GPU, and the same tokens."""
    model, processor = random_mla(name, **SMALL, rotate_at=rotate_at)
    inputs, options = prompt_inputs(name, processor, ["image"]), greedy(model, cache_implementation="static")
    expected = model.generate(**inputs, **options, disable_compile=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # which a reset does not
    how = CompileConfig(backend="eager", fullgraph=True)
    how._compile_all_devices = True  # CPUs too
    assert torch.equal(model.generate(**inputs, **options, compile_config=how), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] in (1, 2)
    torch._dynamo.reset()
