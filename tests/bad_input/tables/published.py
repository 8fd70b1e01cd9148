"""Checkpoints of the published code, and their files of ranks."""

import io

import torch
from cases import Case, both, cut, edited, pipe, removed, text

IMPORT = "import-published published --ranks ranks.pth -o out"
CONFIG = "published/config.json"


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Foreign:
    """What runs a program when it is unpickled without care."""

    def __reduce__(self):
        return exec, ("open('trace', 'w')",)


def order(layers, heads, dim):
    return torch.arange(dim // 2, dtype=torch.uint8).repeat(layers, heads, 2)


RANKS = {
    "nothing": (b"", "ranks.pth"),
    "text": (b"0 1 2", "ranks.pth"),
    "a program": (saved(Foreign()), "ranks.pth"),
    "a list": (saved([1, 2]), "list"),
    "text in a file": (saved("ranks"), "str"),
    "nothing in a file": (saved(None), "NoneType"),
    "an empty tensor": (saved(torch.empty(0, dtype=torch.uint8)), "[0]"),
    "numbers with fractions": (saved(torch.zeros(4, 4, 16)), "float32"),
    "complex numbers": (saved(torch.zeros(4, 4, 16, dtype=torch.complex64)), "complex64"),
    "yes and no": (saved(torch.zeros(4, 4, 16, dtype=torch.bool)), "bool"),
    "a number": (saved(torch.tensor(3)), "[]"),
    "sizes of another model": (saved(order(2, 1, 8)), "[2, 1, 8]"),
    "halves of a file": (saved(order(4, 4, 16))[:-100], "ranks.pth"),
}
PUBLISHED = {
    "no section": (edited(CONFIG, mha2mla=...), "no 'mha2mla'"),
    "a section that is text": (edited(CONFIG, mha2mla="yes"), "no 'mha2mla'"),
    "a section that is a list": (edited(CONFIG, mha2mla=[1]), "no 'mha2mla'"),
    "an unknown key": (edited(CONFIG, mha2mla__fast=True), "fast"),
    "GQA": (edited(CONFIG, mha2mla__is_gqa2mha2mla=True), "is_gqa2mha2mla"),
    "rope dims that are text": (edited(CONFIG, mha2mla__rope_dim_for_mla="8"), "rope_dim_for_mla"),
    "no rope dims": (edited(CONFIG, mha2mla__rope_dim_for_mla=None), "rope_dim_for_mla"),
    "rope dims that are odd": (edited(CONFIG, mha2mla__rope_dim_for_mla=3), "R = 3"),
    "rope dims beyond all": (edited(CONFIG, mha2mla__rope_dim_for_mla=10**20), "R = 100"),
    "rope dims below 0": (edited(CONFIG, mha2mla__rope_dim_for_mla=-2), "R = -2"),
    "a rank that is text": (edited(CONFIG, mha2mla__low_rank="4"), "low_rank"),
    "a rank that is nothing": (edited(CONFIG, mha2mla__low_rank=None), "low_rank"),
    "a rank below 0": (edited(CONFIG, mha2mla__low_rank=-4), "rank"),
    "a rank beyond all": (edited(CONFIG, mha2mla__low_rank=10**9), "rank"),
    "another rank": (edited(CONFIG, mha2mla__low_rank=2), "shape"),
    "a type that is not supported": (edited(CONFIG, model_type="bert"), "bert"),
    "no type": (edited(CONFIG, model_type=...), "model_type"),
    "a type that is a list": (edited(CONFIG, model_type=["llava"]), "model_type"),
    "no text config": (edited(CONFIG, text_config=...), "this model needs"),
    "a text config that is a number": (edited(CONFIG, text_config=5), "text_config"),
    "no heads": (edited(CONFIG, text_config__num_attention_heads=0), "num_attention_heads"),
    "other layers": (edited(CONFIG, text_config__num_hidden_layers=1), "this model needs"),
    "layers that are text": (edited(CONFIG, text_config__num_hidden_layers="4"), "num_hidden_layers"),
    "a config that is a list": (text(CONFIG, "[]"), "no 'mha2mla'"),
    "a config that is broken": (text(CONFIG, "{"), CONFIG),
    "a config that is not text": (text(CONFIG, b"\xff\xfe"), CONFIG),
    "a config that nests without end": (text(CONFIG, "[" * 100_000), CONFIG),
    "a config of a number without end": (text(CONFIG, '{"mha2mla": ' + "9" * 10_000 + "}"), CONFIG),
    "no config": (removed(CONFIG), CONFIG),
    "no weights": (removed("published/model.safetensors"), "model.safetensors"),
    "half the weights": (cut("published/model.safetensors", 100), "model.safetensors"),
    "weights without an end": (cut("published/model.safetensors", -100), "model.safetensors"),
    "no ranks": (removed("ranks.pth"), "ranks.pth"),
    "a pipe for ranks": (both(removed("ranks.pth"), pipe("ranks.pth")), "ranks.pth"),
    "an index that is a list": (text("published/model.safetensors.index.json", "[]"), "index"),
    "an index that is broken": (text("published/model.safetensors.index.json", "{"), "index"),
    "an index without files": (text("published/model.safetensors.index.json", "{}"), "index"),
    "an index of files that are not there": (
        text("published/model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}'),
        "b.safetensors",
    ),
    "an index of files elsewhere": (
        text("published/model.safetensors.index.json", '{"weight_map": {"a": "../small/model.safetensors"}}'),
        "index",
    ),
    "an index of no names": (
        text("published/model.safetensors.index.json", '{"weight_map": {"a": 7}}'),
        "index",
    ),
}
CASES = {
    **{
        f"ranks: {name}": Case(command=IMPORT, change=text("ranks.pth", content), named=named)
        for name, (content, named) in RANKS.items()
    },
    **{name: Case(command=IMPORT, change=change, named=named) for name, (change, named) in PUBLISHED.items()},
    "an output that is full": Case(
        command=IMPORT, change=text("out/mine.txt", "mine"), named="not an empty folder"
    ),
    "a processor that is not there": Case(command=f"{IMPORT} --processor nowhere", named="nowhere"),
    "a file for a checkpoint": Case(
        command="import-published ranks.pth --ranks ranks.pth -o out", named="config.json"
    ),
    "a folder for ranks": Case(command="import-published published --ranks data -o out", named="data"),
}
