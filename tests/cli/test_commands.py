"""Commands on good input: files that load, and the JSON keys that scripts read."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import original, run_command

from mha2mla_vlm import load, load_processor, load_records
from mha2mla_vlm.model.checkpoint import save
from mha2mla_vlm.zoo.chats import write_chats

PUBLISHED = Path(__file__).parents[1] / "fixtures" / "published"


def run(monkeypatch, capsys, *arguments):
    """Result of a command: the last line of its standard output."""
    code, out, err = run_command(monkeypatch, capsys, *arguments)
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.fixture
def workspace(family, tmp_path):
    """A folder with the family's random original model and data."""
    model, processor = original(family)
    save(model, processor, tmp_path / "model")
    (tmp_path / "data").mkdir()
    write_chats(family, tmp_path / "data", split="train", samples=6, seed=0)
    return tmp_path


def test_convert_inspect_evaluate_generate(monkeypatch, capsys, family, workspace):
    out, data = workspace / "out", workspace / "data" / "chats.jsonl"
    command = ["convert", workspace / "model", "--data", data, "-o", out, "--qk-rope-head-dim", 16]
    converted = run(monkeypatch, capsys, *command)
    kv_heads = load(workspace / "model").config.text_config.num_key_value_heads
    assert converted["output"] == str(out)
    assert converted["family"] == family
    assert (converted["qk_rope_head_dim"], converted["kv_lora_rank"]) == (16, 16 * kv_heads)
    assert converted["bytes_per_token"] / converted["bytes_per_token_original"] == 0.25
    assert converted["kl"] > 0

    seen = run(monkeypatch, capsys, "inspect", out)
    assert seen["layers"] == 4
    assert seen["modalities"] == ["text", "vision"]
    assert (seen["rope_selection"], seen["factorization"]) == ("residual", "output-weighted")
    assert seen["bytes_per_token"] / seen["bytes_per_token_original"] == 0.25
    assert [[len(head) for head in layer] for layer in seen["pairs"]] == [[8] * kv_heads] * 4

    command = ["evaluate", out, "--data", data, "--samples", 2, "--baseline"]
    measured = run(monkeypatch, capsys, *command, workspace / "model")
    assert measured["records"] == 2
    assert measured["answers"] == sum(row["answers"] for row in measured["by_kind"].values())
    assert measured["kl"] > 0
    assert {"exact_match", "cross_entropy", "agreement", "baseline_exact_match"} <= measured.keys()
    itself = run(monkeypatch, capsys, *command, out)
    assert (itself["kl"], itself["agreement"]) == (0.0, 1.0)

    image = next((workspace / "data" / "images").glob("*.png"))
    command = ["generate", out, "--image", image, "--prompt", "Read all digits.", "--max-new-tokens", 3]
    answer = run(monkeypatch, capsys, *command)
    assert answer["cache_bytes"] == 2 * converted["bytes_per_token"] // 2 * answer["cached_tokens"]


def test_convert_allocates_a_budget_and_inspect_shows_why(monkeypatch, capsys, workspace, family):
    command = ["convert", workspace / "model", "--data", workspace / "data", "-o", workspace / "out"]
    converted = run(monkeypatch, capsys, *command, "--rotate-at", "write", "--budget", 0.3, "--samples", 4)
    assert 0.27 <= converted["bytes_per_token"] / converted["bytes_per_token_original"] <= 0.3
    seen = run(monkeypatch, capsys, "inspect", workspace / "out")
    for key in ("qk_rope_head_dim", "kv_lora_rank", "predicted_kl"):
        assert len(seen[key]) == 4
        assert seen[key] == converted[key]
    assert seen["folded"]
    lengths = [len(layer[0]) for layer in seen["pairs"]]
    assert lengths == [rope // 2 for rope in seen["qk_rope_head_dim"]]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("family", sorted(path.name for path in PUBLISHED.iterdir() if path.is_dir()))
def test_import_published(monkeypatch, capsys, family, stage, tmp_path):
    folder = PUBLISHED / family
    _, processor = original(family)
    processor.save_pretrained(tmp_path / "processor")
    shutil.copytree(folder / stage, tmp_path / "published")
    command = ["import-published", tmp_path / "published", "--ranks", folder / "ranks.pth"]
    alone = run(monkeypatch, capsys, *command, "-o", tmp_path / "alone")
    assert alone["processor"] is None
    assert alone["qk_rope_head_dim"] == 8
    assert (alone["kv_lora_rank"] is None) == (stage == "stage1")
    for path in (tmp_path / "processor").iterdir():
        shutil.copy(path, tmp_path / "published")
    run(monkeypatch, capsys, *command, "-o", tmp_path / "both")
    assert type(load_processor(tmp_path / "both")) is type(processor)
    assert load(tmp_path / "both").mla_config == load(tmp_path / "alone").mla_config
    assert run(monkeypatch, capsys, "inspect", tmp_path / "both")["family"] == family


@pytest.mark.parametrize("factorization", ["none", "weight-svd", "activation-svd", "split", "only-key"])
@pytest.mark.parametrize("selection", ["high", "low", "uniform", "2-norm"])
def test_every_published_method_converts(monkeypatch, capsys, workspace, family, factorization, selection):
    if family != "llava" and selection != "2-norm":
        pytest.skip("one family shows the selections that do not look at data")
    command = ["convert", workspace / "model", "--data", workspace / "data", "-o", workspace / "out"]
    command += ["--rope-selection", selection, "--factorization", factorization, "--samples", 4]
    command += ["--no-fold", "--qk-rope-head-dim", 32]
    result = run(monkeypatch, capsys, *command)
    model = load(workspace / "out")
    assert model.mla_config.factorization == factorization
    assert (result["kv_lora_rank"] is None) == (factorization == "none")


def test_conversion_keeps_the_stored_dtype(monkeypatch, capsys, workspace):
    model = load(workspace / "model", dtype=torch.bfloat16)
    model.save_pretrained(workspace / "half")
    for path in (workspace / "model").iterdir():
        if path.name not in ("model.safetensors", "config.json"):
            (workspace / "half" / path.name).write_bytes(path.read_bytes())
    command = ["convert", workspace / "half", "--data", workspace / "data", "-o", workspace / "out"]
    run(monkeypatch, capsys, *command, "--samples", 3, "--qk-rope-head-dim", 32)
    assert load(workspace / "out").dtype == torch.bfloat16


def test_zoo_data_and_list(monkeypatch, capsys, tmp_path, family):
    written = run(
        monkeypatch, capsys, "zoo", "data", family, "-o", tmp_path / "data", "--samples", 3, "--seed", 5
    )
    assert len(load_records(written["data"])) == written["records"] == 3
    names = [model["name"] for model in run(monkeypatch, capsys, "zoo", "list")["models"]]
    assert f"zoo:{family}" in names


def test_the_installed_command_answers():
    program = [sys.executable, "-c", "from mha2mla_vlm.cli.main import main; main()"]
    shown = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True)
    assert all(name in shown.stdout for name in ("demo", "convert", "evaluate", "generate", "inspect", "zoo"))


def test_importing_does_nothing():
    code = (
        "import sys, os; before = dict(os.environ); import mha2mla_vlm, mha2mla_vlm.cli.main; "
        "assert dict(os.environ) == before; assert 'torch' not in sys.modules, 'heavy import'; print('ok')"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert shown.stdout.strip() == "ok", shown.stderr


def test_public_names_are_not_hidden_by_modules(forks, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import importlib, pkgutil, mha2mla_vlm as package\n"
        "for module in pkgutil.iter_modules(package.__path__):\n"
        "    importlib.import_module(f'mha2mla_vlm.{module.name}')\n"
        "from mha2mla_vlm import convert, evaluate, load\n"
        "print(all(callable(getattr(package, name)) for name in package.__all__))"
    )
    ended = forks.run(script=str(script), folder=tmp_path)
    assert ended.out.strip() == "True", ended.said
