"""Random tiny models, prompts of every shape, and ways to run a model piece by piece, or a command."""

import copy
import functools
import random
import socket
import sys
import time
import urllib.request
from dataclasses import replace

import pytest
import torch
from tiny_models import new_tiny, page_multiple
from transformers import Cache

from mha2mla_vlm.algorithms.factorization import factorization
from mha2mla_vlm.calibration.activations import MemoryStates, begin
from mha2mla_vlm.calibration.layer_profile import measure_moments
from mha2mla_vlm.cli.main import main
from mha2mla_vlm.config import SHARED, AttentionSizes, MLAConfig
from mha2mla_vlm.conversion.weights import factored_weights, layer_factors, partial_rope_weights, rebuild
from mha2mla_vlm.data.records import Record, encode
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.modeling import (
    attention_of,
    decoder_layers,
    latent_attentions,
    mla_classes,
    text_model,
)
from mha2mla_vlm.model.normed import NORMS
from mha2mla_vlm.model.shipped import ZOO_NAMES
from mha2mla_vlm.utils.compat import cache_argument
from mha2mla_vlm.zoo.chats import make_page

PROMPTS = {
    "text": [("Read all digits.", 0)],
    "image": [("Which digit is in row 1, column 1?", 1)],
    "two turns": [("How many digits are 7?", 0), ("Which digit is the largest in row 1?", 1)],
    "two images": [("How many digits are 3?", 1), ("Read all digits.", 1)],
}

ONE_FAST = pytest.mark.parametrize(  # for a test of the shipped models that takes long
    "family", [ZOO_NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in ZOO_NAMES[1:])]
)


@functools.cache
def _original(name):
    torch.manual_seed(0)
    model, processor = new_tiny(name)
    for attention in filter(None, map(attention_of, decoder_layers(model))):
        for projection in (attention.q_proj, attention.k_proj):
            torch.nn.init.normal_(projection.weight, std=0.12)  # sharp attention: positions and pairs matter
            if projection.bias is not None:
                torch.nn.init.normal_(projection.bias, std=0.3)
        if getattr(attention.v_proj, "bias", None) is not None:
            torch.nn.init.normal_(attention.v_proj.bias, std=0.3)
        for norm in norms_of(attention):
            torch.nn.init.normal_(norm.weight, mean=1.0, std=0.5)
    return model.eval(), processor


def norms_of(attention):
    """The norms of its queries and keys, if it has any."""
    return [getattr(attention, name) for name in NORMS if hasattr(attention, name)]


def original(name):
    """A copy of the family's random model in float32, and its processor."""
    model, processor = _original(name)
    return copy.deepcopy(model), processor


def random_mla(
    name, *, rope_dim=16, rank=40, modalities=("text", "vision"), seed=1, rotate_at="write", bits=None
):
    """A converted model of low rank whose text and vision factors, biases and pairs are all random."""
    base, processor = _original(name)
    config_class, model_class = mla_classes(base.config.model_type)
    mla = {"qk_rope_head_dim": rope_dim, "kv_lora_rank": rank, "modalities": modalities}
    mla |= {"rotate_at": rotate_at}
    if bits is not None:
        mla |= {"kv_lora_rank": sum(bits), "latent_bits": [list(bits)] * 4, "kv_bias": True}
    mla = MLAConfig.from_dict(mla).over_all(AttentionSizes.of(base.config)).to_dict()
    torch.manual_seed(seed)
    values = base.config.to_dict() | {"model_type": config_class.model_type, "mla": mla, "dtype": "float32"}
    model = model_class(config_class(**values))
    model.generation_config = copy.deepcopy(base.generation_config)
    for attention in filter(None, map(attention_of, decoder_layers(model))):
        for parameter in attention.parameters():
            torch.nn.init.normal_(parameter, std=0.12 if parameter.ndim == 2 else 0.3)
        for norm in norms_of(attention):
            torch.nn.init.normal_(norm.weight, mean=1.0, std=0.5)
        pairs = getattr(attention, "rotary_dim", 0) // 2
        for head in getattr(attention, "rope_pairs", ()):  # not of a layer left as it was
            head.copy_(torch.randperm(pairs)[: len(head)].sort().values)
    return model.eval(), processor


def shallow(model, count=2):
    """The model with only its first layers."""
    text_model(model).layers = decoder_layers(model)[:count]
    model.config.text_config.num_hidden_layers = count
    return model


def with_partial_rope(model, selections, mla):
    """The model with only these pairs rotated, and keys and values not factorised."""
    pairs = zip(decoder_layers(model), selections, strict=True)
    weights = [partial_rope_weights(layer.self_attn, selection) for layer, selection in pairs]
    return rebuild(model, replace(mla, kv_lora_rank=None, kv_bias=False, modalities=SHARED), weights)


def with_factors(model, stats, mla):
    """A model of partial RoPE with its keys and values factorised."""
    weights = []
    for index, layer in enumerate(decoder_layers(model)):
        whole = {k: v.detach() for k, v in layer.self_attn.new_weights().items()}
        given = (whole, stats[index], mla.layer(index), factorization(mla.factorization))
        factors = layer_factors(*given, head_dim=layer.self_attn.head_dim)
        weights.append(factored_weights(whole, factors))
    return rebuild(model, mla, weights)


def moments_of(model, batches):
    """Statistics of what goes into every layer's attention."""
    visual = get_family(model.config.model_type).visual_token_ids(model.config)
    states = MemoryStates()
    chats = begin(model, batches, visual, torch.device("cpu"), states, ["calibration"])
    given = (chats, states, "calibration")
    layers = enumerate(decoder_layers(model))
    return [measure_moments(layer, index, *given, total=len(chats)) for index, layer in layers]


def record(name, prompt, seed=0):
    """A chat of the turns of a `PROMPTS` entry, each with its images, that waits for an answer."""
    rng = random.Random(f"{prompt}/{seed}")
    messages, images = [], []
    for question, count in PROMPTS[prompt]:
        if messages:
            messages.append({"role": "assistant", "content": "7"})
        for _ in range(count):
            rows, columns = rng.randint(1, 3), rng.randint(1, 3)
            page = make_page(
                rng, split="test", multiple=page_multiple(name), rows=rows, columns=columns, augment=False
            )
            images.append(page.image)
        content = [{"type": "image"}] * count + [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
    return Record(messages=messages, images=images)


def answered(name, count=6, prompts=("image", "two images")):
    """Chats of the `prompts` in turn, each with an answer."""
    asked = [record(name, prompts[seed % len(prompts)], seed) for seed in range(count)]
    answer = {"role": "assistant", "content": "7"}
    return [Record(messages=[*r.messages, answer], images=r.images) for r in asked]


def prompt_inputs(name, processor, prompts, side="left"):
    """A padded batch of prompts with explicit positions, so that whole and piecewise runs agree."""
    processor.tokenizer.padding_side = side
    inputs = encode(processor, [record(name, p, i) for i, p in enumerate(prompts)], generation_prompt=True)
    processor.tokenizer.padding_side = "left"
    return dict(inputs)


def with_positions(model, inputs):
    """`inputs` plus position ids that skip padding, multimodal ones where the model has them."""
    mask = inputs["attention_mask"]
    multimodal = hasattr(model.model, "get_rope_index")
    if multimodal and "image_grid_thw" in inputs:
        names = ("input_ids", "image_grid_thw", "attention_mask", "mm_token_type_ids")
        positions, _ = model.model.get_rope_index(**{name: inputs[name] for name in names})
    else:
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        positions = positions.expand(3, -1, -1) if multimodal else positions
    return inputs | {"position_ids": positions}


@torch.no_grad()
def whole_logits(model, inputs):
    """Logits of one forward without a cache."""
    return model(**with_positions(model, inputs), use_cache=False).logits


@torch.no_grad()
def piecewise_logits(model, inputs, cuts, cache: Cache):
    """Logits of the tokens of a single row given in pieces that end at `cuts`, over a growing cache.

    Every image goes with the piece that holds its placeholders.
    """
    full = with_positions(model, inputs)
    is_image = full["input_ids"][0] == model.config.image_token_id
    starts = (is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:-1]).nonzero()[:, 0].tolist()
    seen_both_ways = "gemma" in model.config.model_type  # images, by the types of all tokens so far
    logits, start, patches = [], 0, 0
    for stop in [*cuts, full["input_ids"].shape[1]]:
        piece = {
            "input_ids": full["input_ids"][:, start:stop],
            "attention_mask": full["attention_mask"][:, :stop],
            "position_ids": full["position_ids"][..., start:stop],
        }
        if (types := get_family(model.config.model_type).token_types) in full and seen_both_ways:
            piece[types] = full[types][:, :stop]
        shown = [i for i, at in enumerate(starts) if start <= at < stop]
        if shown and len(shown) == len(starts):
            piece = {k: v for k, v in full.items() if k != "mm_token_type_ids"} | piece
        elif shown:
            first, last = shown[0], shown[-1] + 1
            for key in ("image_sizes", "image_grid_thw", "image_position_ids"):
                if key in full:
                    piece[key] = full[key][first:last]
            if "image_grid_thw" in full:  # patches of all images in one row
                count = int(piece["image_grid_thw"].prod(-1).sum())
                piece["pixel_values"] = full["pixel_values"][patches : patches + count]
                patches += count
            else:
                piece["pixel_values"] = full["pixel_values"][first:last]
        logits.append(model(**piece, **cache_argument(cache), use_cache=True).logits)
        start = stop
    return torch.cat(logits, dim=1)


def set_attention(model, **values):
    """Set attributes of every attention layer, to choose its path."""
    for attention in latent_attentions(decoder_layers(model)):
        for key, value in values.items():
            setattr(attention, key, value)
    return model


def greedy(model, new=6, **more):
    """Options of `generate` for as many tokens of text, each the most likely."""
    banned = list(model.visual_token_ids)
    return {
        "max_new_tokens": new,
        "min_new_tokens": new,
        "do_sample": False,
        "suppress_tokens": banned,
    } | more


def generate(model, inputs, **kwargs):
    """Six greedy tokens, without the prompt."""
    output = model.generate(**inputs, **greedy(model, **kwargs))
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    return sequences[:, inputs["input_ids"].shape[1] :]


def only_second_image(model, inputs):
    """Inputs of a second turn over a cache: all tokens, but pixels of the new image alone."""
    if "image_grid_thw" in inputs:  # transformers finds multimodal positions from the grids of all images
        inputs = with_positions(model, inputs)
        inputs["pixel_values"] = inputs["pixel_values"][int(inputs["image_grid_thw"][0].prod()) :]
        inputs["image_grid_thw"] = inputs["image_grid_thw"][1:]
        return inputs
    by_image = {"pixel_values", "image_sizes", "image_position_ids"} & inputs.keys()
    return inputs | {key: inputs[key][1:] for key in by_image}


def logits_of_backends(model, inputs, *backends):
    """Logits of three tokens that `generate` gives with each decode backend."""
    options = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    logits = []
    for backend in backends:
        set_attention(model, decode_backend=backend)
        logits.append(torch.stack(model.generate(**inputs, **options).logits))
    return logits


def real_tokens(logits, inputs):
    """Logits of the tokens that are not padding."""
    return logits[inputs["attention_mask"].bool()]


def run_command(monkeypatch, capsys, *arguments):
    """Exit code, stdout and stderr of a command."""
    monkeypatch.setattr(sys, "argv", ["mha2mla", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    output = capsys.readouterr()
    return ended.value.code, output.out, output.err


def free_port():
    """A port of loopback that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(address, process, log, seconds=180):
    """Until a server answers at an address; fails with what it wrote to its log if it ends before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(address)
