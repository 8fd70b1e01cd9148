"""A checkpoint loads by transformers: with the package, and alone, by the code beside it."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import prompt_inputs, random_mla, set_attention
from safetensors.torch import load_file, save_file

from mha2mla_vlm import load, save
from mha2mla_vlm.config import MLAConfig
from mha2mla_vlm.model.cache.latent import LatentCache
from mha2mla_vlm.model.carried import FORMAT, READS
from mha2mla_vlm.zoo.chats import make_page

PROGRAM = Path(__file__).parents[1] / "processes" / "plain_transformers.py"
MODELS = {
    "llava": ("llava", {}),
    "llava_next": ("llava_next", {}),
    "qwen2_5_vl": ("qwen2_5_vl", {}),
    "normed": ("qwen3_vl", {}),
    "in bits": ("llava", {"bits": (4, 12, 8, 8)}),
    "at read": ("qwen2_5_vl", {"rotate_at": "read"}),
    "several kinds of layers": ("gemma4", {"rope_dim": 8, "rank": 20, "rotate_at": "read"}),
}
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
KEY = "model.language_model.layers.1.self_attn.kv_b_proj.vision.weight"


def with_weights(folder, change):
    """Change the weights of a checkpoint."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_config(folder, change):
    """Change the config of a checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


DAMAGES = {  # what is done to a checkpoint, and what is then said
    "missing": (with_weights, lambda w: w.pop(KEY), f"missing keys {KEY}"),
    "extra": (with_weights, lambda w: w.update({KEY + "s": w[KEY].clone()}), f"unexpected keys {KEY}s"),
    "misshaped": (with_weights, lambda w: w.update({KEY: w[KEY][1:].clone()}), f"{KEY} has shape"),
    "unknown key": (with_config, lambda c: c["mla"].update(kv_lora_ranks=3), "unknown key(s) kv_lora_ranks"),
    "unsound": (with_config, lambda c: c.update(image_token_index=10**6), "give the id of a token"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Checkpoints, whole and damaged, and their inputs, with what two processes wrote that loaded them."""
    place, inputs = tmp_path_factory.mktemp("alone"), {}
    for name, (family, options) in MODELS.items():
        model, processor = random_mla(family, **options)
        model = load(save(model, processor, place / "first" / name))  # completes the config
        save(model, processor, place / name)
        inputs[name] = prompt_inputs(family, processor, ["two images"])
    for name, (how, change, _) in DAMAGES.items():
        shutil.copytree(place / "llava", place / name)
        how(place / name, change)
        inputs[name] = inputs["llava"]
    shutil.copytree(place / "llava", place / "newer")
    entry = place / "newer" / "modeling_mha2mla.py"
    entry.write_text(entry.read_text().replace(f"{FORMAT} not in READS", "99 not in READS"))
    torch.save({"newer": inputs["llava"]} | inputs, place / "inputs.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1"}
    page = make_page(random.Random(0), split="test", multiple=28, rows=1, columns=1, augment=False)
    page.image.save(place / "picture.png")
    run = subprocess.run([sys.executable, PROGRAM], env=environment, cwd=place, check=False)
    assert run.returncode == 0
    return place


@pytest.fixture
def said(place):
    """What the checkpoints said in each process."""
    return {how: torch.load(place / f"said {how}.pt", weights_only=True) for how in ("alone", "with")}


@pytest.mark.parametrize(
    ("how", "name"), [*(("alone", name) for name in MODELS), ("with", "llava"), ("with", "newer")]
)
def test_logits_and_tokens_are_those_of_the_package(place, said, how, name):
    model, inputs = load(place / name), torch.load(place / "inputs.pt", weights_only=True)[name]
    got, carried = said[how][name], (how, name) != ("with", "llava")
    assert got["module"].startswith("transformers_modules." if carried else "mha2mla_vlm.")
    with torch.no_grad():
        assert torch.equal(got["logits"], model(**inputs, use_cache=False).logits)
    if carried:
        set_attention(model, decode_backend="torch")  # it has no kernels
    out = model.generate(**inputs, **OPTIONS)
    assert torch.equal(got["tokens"], out.sequences)
    assert torch.equal(got["decoded"], torch.stack(out.logits))
    assert got["cache"] == LatentCache.__name__
    assert got["inner"] == type(model.model).__name__
    assert got["processor"] == model.family.processor_class


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints_are_refused(said, name):
    assert said["alone"][name]["error"].startswith("InputError: ")
    assert DAMAGES[name][2] in said["alone"][name]["error"]


def test_what_is_saved_again_is_the_same(place, said):
    for how, name in (*(("alone", name) for name in MODELS), ("with", "llava")):
        again = place / f"again {how}" / name
        code = {path.name for path in (place / name).glob("*.py")}
        assert code == {path.name for path in again.glob("*.py")}
        for file in (*code, "model.safetensors", "config.json", "generation_config.json"):
            assert (again / file).read_bytes() == (place / name / file).read_bytes(), file


def test_the_package_was_there_or_not(said):
    assert said["alone"]["imported"] == []
    assert said["with"]["imported"]
    assert "pip install mha2mla-vlm" in said["alone"]["llava"]["kernels"]
    assert said["with"]["llava"]["kernels"] == "taken"


@pytest.mark.parametrize("how", ["alone", "with"])
def test_the_example_of_the_card_runs(said, how):
    assert said[how]["example"].shape[1] > 64


def test_this_package_reads_what_it_writes():
    assert FORMAT in READS


def test_older_code_does_not_take_what_it_cannot_read():
    fields = "factorization folded kl kv_bias kv_lora_rank latent_bits modalities original predicted_kl"
    fields += " qk_rope_head_dim rope_selection rotate_at"
    known = {1: fields.split()}  # of MLAConfig, by FORMAT: a new field needs a new one
    assert sorted(field.name for field in dataclasses.fields(MLAConfig)) == known[FORMAT]
