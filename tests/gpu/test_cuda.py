"""What only a GPU shows: devices, offloading, half precision. Skipped without one."""

import copy

import pytest
import torch
from helpers import prompt_inputs, random_mla, real_tokens, whole_logits

from mha2mla_vlm.model.cache.latent import LatentCache
from mha2mla_vlm.utils.compat import cache_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BATCH = ["image", "text", "two images"]


def on_gpu(inputs):
    """Inputs moved to the GPU."""
    return {key: value.to("cuda") for key, value in inputs.items()}


def test_logits_are_those_of_the_cpu(family):
    model, processor = random_mla(family)
    inputs = prompt_inputs(family, processor, BATCH)
    expected = real_tokens(whole_logits(model, inputs), inputs)
    gpu = copy.deepcopy(model).to("cuda")
    got = real_tokens(whole_logits(gpu, on_gpu(inputs)), on_gpu(inputs)).cpu()
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "offloaded"}], ids=["latent", "offloaded"])
def test_generate_is_that_of_the_cpu(family, how):
    model, processor = random_mla(family)
    inputs = prompt_inputs(family, processor, ["image"])
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": list(model.visual_token_ids)}
    expected = model.generate(**inputs, **options)
    got = copy.deepcopy(model).to("cuda").generate(**on_gpu(inputs), **options, **how)
    assert torch.equal(got.cpu(), expected)


def test_bfloat16_decodes_into_a_bfloat16_cache(family):
    model, processor = random_mla(family)
    inputs = on_gpu(prompt_inputs(family, processor, ["image"]))
    model = model.to("cuda", torch.bfloat16)
    output = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    assert isinstance(cache_of(output), LatentCache)
    assert {layer.keys.dtype for layer in cache_of(output).layers} == {torch.bfloat16}
