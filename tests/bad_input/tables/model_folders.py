"""Folders of models: weights and their index, tokenizers, processors, templates."""

import json
import struct

import torch
from cases import CONVERT, EVALUATE, FINETUNE, GENERATE, Case, both, cut, edited, pipe, removed, text
from safetensors.torch import load_file, save

WEIGHTS, INDEX = "model/model.safetensors", "model/model.safetensors.index.json"


def header(content, body=b""):
    """A file of safetensors with that header."""
    encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(encoded)) + encoded + body


def weights(place, change):
    """A change of tensors."""

    def changed(folder):
        tensors = load_file(folder / place)
        change(tensors)
        text(place, save(tensors, metadata={"format": "pt"}))(folder)

    return changed


def key(tensors, name="self_attn.q_proj.weight"):
    return next(each for each in sorted(tensors) if each.endswith(name) and "vision" not in each)


def without(tensors):
    del tensors[key(tensors)]


def extra(tensors):
    tensors["model.language_model.layers.0.self_attn.k_norm.weight"] = torch.ones(64)


def of(kind):
    def change(tensors):
        tensors[key(tensors)] = tensors[key(tensors)].mul(10).to(kind)

    return change


def reshaped(tensors):
    tensors[key(tensors)] = tensors[key(tensors)][:-1].clone()


def flat(tensors):
    tensors[key(tensors)] = tensors[key(tensors)].flatten()


def not_finite(value, name="self_attn.q_proj.weight"):
    def change(tensors):
        tensors[key(tensors, name)].fill_(value)

    return change


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FILES = {
    "nothing": b"",
    "text": b"weights",
    "zero bytes": b"\0" * 64,
    "a header without end": struct.pack("<Q", 2**62) + b"{}",
    "a header that is broken": header(b"{"),
    "a header that is a list": header([]),
    "a header that is not text": header(b"\xff\xfe"),
    "a header of nothing": header({}),
    "an entry without a shape": header({"a": {"dtype": "F32"}}),
    "an entry beyond the file": header({"a": ENTRY | {"data_offsets": [0, 800]}}, b"\0" * 8),
    "an entry before the file": header({"a": ENTRY | {"data_offsets": [-8, 0]}}, b"\0" * 8),
    "an entry that ends before it begins": header({"a": ENTRY | {"data_offsets": [8, 0]}}, b"\0" * 8),
    "a format that there is not": header({"a": ENTRY | {"dtype": "F7"}}, b"\0" * 8),
    "a shape without end": header({"a": ENTRY | {"shape": [2**40, 2**40]}}, b"\0" * 8),
    "a shape below 0": header({"a": ENTRY | {"shape": [-2]}}, b"\0" * 8),
}
CHANGED = {
    "a weight missing": (without, "missing"),
    "a weight too many": (extra, "unexpected"),
    "a weight of another shape": (reshaped, "has shape"),
    "a weight of one dimension": (flat, "has shape"),
    "a weight of whole numbers": (of(torch.int8), "I8"),
    "a weight of yes and no": (of(torch.bool), "BOOL"),
    "a weight of eight bits": (of(torch.float8_e4m3fn), "F8"),
    "a weight that is no number": (not_finite(torch.nan), "not finite"),
    "a weight without end": (not_finite(torch.inf), "not finite"),
}
INDEXES = {
    "empty": "",
    "broken": "{",
    "a list": "[]",
    "a number": "7",
    "of nothing": "{}",
    "of no files": '{"weight_map": {}}',
    "a map that is a list": '{"weight_map": [1]}',
    "a map of numbers": '{"weight_map": {"a": 7}}',
    "a map of lists": '{"weight_map": {"a": ["b"]}}',
    "a file that is not there": '{"weight_map": {"a": "other.safetensors"}}',
    "a file elsewhere": '{"weight_map": {"a": "../small/model.safetensors"}}',
    "an absolute name": '{"weight_map": {"a": "/etc/hostname"}}',
    "deep nesting": "[" * 100_000,
    "not text": b"\xff\xfe",
}
PROCESSORS = {
    "no tokenizer": removed("tokenizer.json"),
    "an empty tokenizer": text("tokenizer.json", ""),
    "a broken tokenizer": text("tokenizer.json", "{"),
    "a tokenizer that is a list": text("tokenizer.json", "[]"),
    "a tokenizer of nothing": text("tokenizer.json", "{}"),
    "half a tokenizer": cut("tokenizer.json", 5000),
    "a tokenizer that is not text": text("tokenizer.json", b"\xff\xfe\x00"),
    "a tokenizer's config that is broken": text("tokenizer_config.json", "{"),
    "a tokenizer's config that is a list": text("tokenizer_config.json", "[]"),
    "a processor that is broken": text("processor_config.json", "{"),
    "a processor that is a list": text("processor_config.json", "[]"),
    "a processor that is not text": text("processor_config.json", b"\xff\xfe"),
    "a processor that there is not": edited("processor_config.json", processor_class="BestProcessor"),
    "a processor of nothing": text("processor_config.json", "{}"),
    "a processor without images": edited("processor_config.json", image_processor=5),
    "a template that is broken": text("chat_template.jinja", "{% for"),
    "a template that fails": text("chat_template.jinja", "{{ raise_exception('no') }}"),
    "a template of what there is not": text("chat_template.jinja", "{{ nothing.at.all }}"),
    "a template that imports": text("chat_template.jinja", "{% import 'os' as os %}"),
    "a template that looks inside": text("chat_template.jinja", "{{ ''.__class__.__mro__ }}"),
    "a template of one text": text("chat_template.jinja", "hello"),
}


def inside(folder, change):
    """A change within a folder."""
    return lambda files: change(files / folder)


CASES = {
    **{
        f"weights: {name}": Case(command=CONVERT, change=text(WEIGHTS, content), named="model")
        for name, content in FILES.items()
    },
    **{
        f"weights of a converted model: {name}": Case(
            command=GENERATE, change=text("small/model.safetensors", content), named="weights"
        )
        for name, content in FILES.items()
    },
    **{
        name: Case(command=CONVERT, change=weights(WEIGHTS, change), named=named)
        for name, (change, named) in CHANGED.items()
        if named != "not finite"  # a line for the layer, after the plan
    },
    **{
        f"original: {name}": Case(
            command=GENERATE.replace("small", "model"), change=weights(WEIGHTS, change), named=named
        )
        for name, (change, named) in CHANGED.items()
        if named == "not finite"
    },
    **{
        f"converted: {name}": Case(
            command=GENERATE, change=weights("small/model.safetensors", change), named=named
        )
        for name, (change, named) in CHANGED.items()
    },
    **{
        f"index: {name}": Case(command=CONVERT, change=text(INDEX, content), named="model")
        for name, content in INDEXES.items()
    },
    **{
        f"converted: index: {name}": Case(
            command=GENERATE,
            change=both(
                text("small/model.safetensors.index.json", content), removed("small/model.safetensors")
            ),
            named="small",
        )
        for name, content in INDEXES.items()
    },
    **{
        name: Case(command=CONVERT, change=inside("model", change), named="processor")
        for name, change in PROCESSORS.items()
    },
    **{
        f"evaluated: {name}": Case(command=EVALUATE, change=inside("small", change), named="processor")
        for name, change in PROCESSORS.items()
    },
    "no folder": Case(command="convert nowhere/at/all --data data -o out", named="nowhere/at/all"),
    "a folder of nothing": Case(
        command="convert none --data data -o out", change=lambda files: (files / "none").mkdir(), named="none"
    ),
    "a file": Case(command="convert ranks.pth --data data -o out", named="ranks.pth"),
    "an empty name": Case(command="convert", more=("", "--data", "data", "-o", "out"), named="model"),
    "a zero byte in a name": Case(command="convert", more=("a\0b", "--data", "data", "-o", "out"), named="a"),
    "a name that is too long": Case(command=f"convert {'x' * 300} --data data -o out", named="x" * 30),
    "a name above": Case(command="convert .. --data data -o out", named=".."),
    "a zoo model that there is not": Case(command="convert zoo:best --data data -o out", named="zoo:best"),
    "no weights": Case(command=CONVERT, change=removed(WEIGHTS), named="weights"),
    "weights that run code": Case(
        command=CONVERT,
        change=both(removed(WEIGHTS), text("model/pytorch_model.bin", b"cos\nsystem\n(S'touch trace'\ntR.")),
        named="pytorch_model.bin",
    ),
    "a pipe for weights": Case(command=CONVERT, change=pipe(WEIGHTS), named="model.safetensors"),
    "a pipe for a config": Case(command=CONVERT, change=pipe("model/config.json"), named="config.json"),
    "a converted model for an original": Case(
        command="convert small --data data -o out", named="converted already"
    ),
    "an original for a converted model": Case(command="inspect model", named="not a converted model"),
    "no weights to inspect": Case(
        command="inspect small", change=removed("small/model.safetensors"), named="small"
    ),
    "a baseline to learn from that is not there": Case(
        command="finetune small --data data -o out --baseline nowhere", named="nowhere"
    ),
    "a baseline to learn from that is broken": Case(
        command=FINETUNE, change=cut(WEIGHTS, 1000), named="model"
    ),
    "no baseline to learn from": Case(command="finetune small --data data -o out", named="--baseline"),
    "a baseline that is not there": Case(command=f"{EVALUATE} --baseline nowhere", named="nowhere"),
    "an adapter that is not there": Case(command=f"{CONVERT} --adapter nowhere", named="nowhere"),
    "an adapter that is broken": Case(
        command=f"{CONVERT} --adapter lora", change=text("lora/adapter_config.json", "{"), named="lora"
    ),
    "an adapter that is a list": Case(
        command=f"{CONVERT} --adapter lora", change=text("lora/adapter_config.json", "[]"), named="lora"
    ),
    "an adapter of nothing": Case(
        command=f"{CONVERT} --adapter lora", change=text("lora/adapter_config.json", "{}"), named="lora"
    ),
}
