"""Import of published checkpoints: their logits, from both attention paths, and what is refused."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_published import FOLDER, PUBLISHED, distance, golden, golden_inputs, logits

from mha2mla_vlm.conversion.import_published import import_published
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.checkpoint import load, save
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.utils.compat import cache_argument, cache_of

STAGES = ("stage1", "stage2")


@functools.cache
def imported(family, stage):
    return import_published(FOLDER / family / stage, FOLDER / family / "ranks.pth")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", PUBLISHED)
def test_an_imported_checkpoint_gives_the_published_logits(family, stage):
    found = logits(imported(family, stage), golden_inputs(family), use_cache=False)
    assert distance(found, golden(family)[stage]) < 1e-5


@pytest.mark.parametrize("family", PUBLISHED)
@torch.no_grad()
def test_the_absorbed_path_gives_the_published_logits(family):
    model, given = imported(family, "stage2"), golden_inputs(family)
    ids, split = given["input_ids"], given["input_ids"].shape[1] - 4
    prompt = given | {k: given[k][:, :split] for k in ("input_ids", "attention_mask")}
    if "mm_token_type_ids" in given:
        prompt["mm_token_type_ids"] = given["mm_token_type_ids"][:, :split]
    first = model(**prompt, use_cache=True)
    cache, found = cache_of(first), [first.logits]
    limits = {layer.self_attn.absorb_limit for layer in decoder_layers(model)}
    assert min(limits) >= 1  # one new token at a time is absorbed
    for i in range(split, ids.shape[1]):
        step = model(input_ids=ids[:, i : i + 1], **cache_argument(cache), use_cache=True)
        found.append(step.logits)
    assert distance(torch.cat(found, dim=1), golden(family)["stage2"]) < 1e-4


def test_sharded_weights_import_alike_and_the_result_loads_alone(tmp_path):
    source, sharded = FOLDER / "llava" / "stage2", tmp_path / "sharded"
    sharded.mkdir()
    shutil.copy(source / "config.json", sharded)
    state = load_file(source / "model.safetensors")
    names = sorted(state)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, sharded / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    save(import_published(sharded, FOLDER / "llava" / "ranks.pth"), None, tmp_path / "ours")
    expected = imported("llava", "stage2").state_dict()
    found = load(tmp_path / "ours").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.fixture
def broken(tmp_path):
    """A copy of a published folder, to break."""
    copy = tmp_path / "broken"
    shutil.copytree(FOLDER / "llava" / "stage2", copy)
    return copy


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["mha2mla"] |= changes
    path.write_text(json.dumps(config))


def edit_weights(folder, edit):
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors")


LAYER = "language_model.model.layers.1.self_attn."
BREAKS = {
    "unknown key": (lambda f: edit_config(f, surprise=1), "unknown mha2mla key.*surprise"),
    "odd rope dim": (lambda f: edit_config(f, rope_dim_for_mla=7), "R = 7"),
    "text for a number": (lambda f: edit_config(f, low_rank="4"), "low_rank = '4'"),
    "grouped": (lambda f: edit_config(f, is_gqa2mha2mla=True), "is_gqa2mha2mla"),
    "missing factor": (
        lambda f: edit_weights(f, lambda s: s.pop(LAYER + "kv_proj_img.up_k.weight")),
        "kv_proj_img.up_k.weight is missing",
    ),
    "missing mlp": (
        lambda f: edit_weights(f, lambda s: s.pop("language_model.model.layers.1.mlp.up_proj.weight")),
        "mlp.up_proj",
    ),
    "extra": (
        lambda f: edit_weights(f, lambda s: s.update({LAYER + "kv_proj.up_k.weight": torch.zeros(1)})),
        "extra published weight.*kv_proj.up_k",
    ),
    "misshaped": (
        lambda f: edit_weights(f, lambda s: s.update({LAYER + "k_r_proj.weight": torch.zeros(3, 64)})),
        r"k_r_proj.weight is of shape \[3, 64\]",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "truncated": (lambda f: (f / "model.safetensors").write_bytes(b"abc"), "cannot read the weights"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_checkpoint_is_a_clear_error(broken, name):
    damage, message = BREAKS[name]
    damage(broken)
    with pytest.raises(InputError, match=message):
        import_published(broken, FOLDER / "llava" / "ranks.pth")


def test_an_unconverted_folder_is_a_clear_error():
    with pytest.raises(InputError, match="no 'mha2mla'"):
        import_published(FOLDER / "llava" / "base", FOLDER / "llava" / "ranks.pth")


def test_a_rank_file_that_does_not_fit_is_a_clear_error(tmp_path):
    folder, right = FOLDER / "llava" / "stage1", torch.load(FOLDER / "llava" / "ranks.pth")
    wrong = {
        "text.pth": (None, "cannot read the rank file"),
        "shape.pth": (right[:, :2], r"of shape \[3, 4, 16\]"),
        "float.pth": (right.float(), "whole numbers"),
        "halves.pth": (torch.cat([right[..., :8], right[..., 8:].flip(-1)], -1), "alike in both halves"),
        "twice.pth": (torch.zeros_like(right), "each pair of a head once"),
    }
    for name, (tensor, message) in wrong.items():
        path = tmp_path / name
        path.write_text("no tensor") if tensor is None else torch.save(tensor, path)
        with pytest.raises(InputError, match=message):
            import_published(folder, path)
    with pytest.raises(InputError, match="cannot read the rank file"):
        import_published(folder, tmp_path / "absent.pth")
