"""For two processes: a sharded model decodes as a whole one, and gets the same gradients.

Also projections that are units of their own, so that no forward of theirs gathers them for the
absorbed path. Prints `same` from the first process.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import original, piecewise_logits, prompt_inputs, random_mla

from mha2mla_vlm.data.records import Record, encode_with_labels
from mha2mla_vlm.model.cache.latent import LatentCache
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.zoo.chats import sample_chats


def decoded(model, inputs):
    """Logits of a prompt whose last three tokens come one by one over a cache: the absorbed path."""
    length = inputs["input_ids"].shape[1]
    return piecewise_logits(model.eval(), inputs, range(length - 3, length), LatentCache())


def gradients(model, batch):
    """Of the loss, by parameter, whole."""
    model.train()
    model.zero_grad()
    model(**batch, use_cache=False).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in found.items()}


def main(family):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, _ = random_mla(family)
    _, processor = original(family)
    chat = next(iter(sample_chats(family, split="train", samples=1, seed=2)))
    record = Record(messages=chat.messages, images=chat.images)
    batch = encode_with_labels(processor, [record], model.visual_token_ids)
    prompt = prompt_inputs(family, processor, ["two images"])
    logits, grads = decoded(model, prompt), gradients(model, batch)
    for layer in decoder_layers(model):
        for projection in layer.self_attn.kv_b_proj.values():
            fully_shard(projection, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(decoder_layers(model)[0].self_attn.kv_b_proj["text"].weight, DTensor)
    torch.testing.assert_close(decoded(model, prompt), logits, rtol=1e-4, atol=1e-5)
    sharded = gradients(model, batch)
    assert sharded.keys() == grads.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(sharded[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    if dist.get_rank() == 0:
        print("same")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
