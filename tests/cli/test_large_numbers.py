"""Numbers that no library takes are refused by the option's name, before anything is imported."""

import pytest
import torch
from helpers import run_command

from mha2mla_vlm.cli import main

HUGE = 10**20
CONVERT = ("convert", "zoo:llava", "--data", "no", "-o", "out")
FINETUNE = ("finetune", "zoo:llava", "--data", "no", "-o", "out")
COMMANDS = {
    CONVERT: ("--samples", "--qk-rope-head-dim", "--d-kv"),
    ("evaluate", "zoo:llava", "--data", "no"): ("--samples", "--batch-size"),
    ("generate", "zoo:llava", "--prompt", "Which?"): ("--max-new-tokens",),
    ("chat", "zoo:llava"): ("--max-new-tokens", "--port"),
    ("report", "out"): ("--samples", "--layer-samples"),
    ("task", "no", "-o", "out", "--name", "asked"): ("--max-new-tokens",),
    ("demo",): ("--samples",),
    ("bench", "zoo:llava", "--baseline", "zoo:llava"): ("--context", "--batch-size"),
    ("zoo", "data", "llava", "-o", "out"): ("--samples",),
    ("zoo", "build", "llava", "-o", "out"): ("--seed",),
    FINETUNE: (
        "--seed",
        "--batch-size",
        "--gradient-accumulation",
        "--max-steps",
        "--max-length",
        "--lora-rank",
        "--eval-samples",
        "--evaluate-every",
        "--save-every",
        "--workers",
    ),
}


@pytest.mark.parametrize(
    ("command", "option"), [(c, option) for c, names in COMMANDS.items() for option in names]
)
def test_a_huge_number(command, option, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_command(monkeypatch, capsys, *command, option, HUGE)
    assert (code, out) == (2, "")
    assert f"Invalid value for '{option}'" in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--qk-rope-head-dim", "give an even number from 2 to the head dim 64"),
        ("--d-kv", "that is d_kv up to 64"),
    ],
)
def test_large_sizes(option, says, monkeypatch, capsys, tmp_path):
    """These have limits of the model's."""
    monkeypatch.chdir(tmp_path)
    code, _, err = run_command(monkeypatch, capsys, *CONVERT, option, 10**9)
    assert code == 2
    assert says in " ".join(err.split())
    assert not list(tmp_path.iterdir())


def test_bench_says_what_would_fit(monkeypatch, capsys, forks, workspace_for_forks, tmp_path):
    models = (workspace_for_forks / "small", "--baseline", workspace_for_forks / "model")
    command = ("bench", *models, "--context", 10**9, "--context", 2 * 10**9, "--batch-size", 1)
    code, out, err = run_command(monkeypatch, capsys, *command, "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "error: no context fits: the caches may take" in err
    assert "the model is made for up to 2,048 tokens" in err
    assert not list(tmp_path.iterdir())


def test_memory_that_is_lacking_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(main, "app", lambda **_: torch.empty(2**60))
    code, out, err = run_command(monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "memory" in err
