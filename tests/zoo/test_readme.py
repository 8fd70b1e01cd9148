"""What the README says to type runs, as it is written there."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from helpers import run_command
from typer.main import get_command

from mha2mla_vlm.cli.main import app
from mha2mla_vlm.zoo.chats import write_chats

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ORIGINAL = "Qwen/Qwen2.5-VL-7B-Instruct"
LESS = {  # than a user would take
    "convert": "--samples 10",
    "evaluate": "--samples 4",
    "report": "--samples 2 --layer-samples 0",
    "finetune": "--max-steps 1 --gradient-accumulation 2 --eval-samples 2",
}


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    assert code.count("samples=64") == 1
    names = {}
    exec(compile(code.replace("samples=64", "samples=12"), "README.md", "exec"), names)
    assert names["small"].mla_config.kl["factorization"] < 0.5
    assert (tmp_path / "small" / "modeling_mha2mla.py").is_file()
    assert re.fullmatch(r"[0-9 ]+", re.search(r"text='([^']*)'", capsys.readouterr().out)[1])


def quickstart():
    """Words of each line of the block that converts a model of one's own."""
    (block,) = (
        b for b in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if "convert" in b and "make" not in b
    )
    return [shlex.split(line, comments=True) for line in block.splitlines()]


@pytest.fixture
def chats(tmp_path, monkeypatch):
    """The files that the quickstart names, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, split in (("chats", "train"), ("held-out", "test")):
        Path(f"{name}.files").mkdir()
        path = write_chats("qwen2_5_vl", Path(f"{name}.files"), split=split, samples=10, seed=1)
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            line["images"] = [f"{name}.files/{image}" for image in line["images"]]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_the_quickstart_runs(chats, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    ran, results = [], {}
    for program, *words in quickstart():
        if program != "mha2mla":
            continue
        words = ["zoo:qwen2_5_vl" if word == ORIGINAL else word for word in words]
        if words[0] == "chat":  # tests/pages run it
            get_command(app).commands["chat"].make_context("chat", words[1:]).close()
            continue
        code, out, err = run_command(monkeypatch, capsys, *words, *LESS[words[0]].split())
        assert code == 0, (words, err)
        ran.append(words[0])
        results[words[0]] = json.loads(out.splitlines()[-1])
    assert ran == ["convert", "convert", "evaluate", "report", "finetune"]
    assert results["convert"]["bytes_per_token"] <= 256 < results["convert"]["bytes_per_token_original"]
    assert results["evaluate"]["kl"] < 1
    assert Path("small/report.html").stat().st_size > 50_000
    assert results["finetune"]["steps"] == 1
    assert Path("tuned/config.json").is_file()


def test_what_else_the_quickstart_needs_is_there():
    others = [words for words in quickstart() if words[0] != "mha2mla"]
    (install, serve) = others
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    assert install[:3] == ["pip", "install", "-c"]
    assert (ROOT / install[3]).is_file()
    assert set(install[4].strip(".[]").split(",")) <= extras.keys()
    assert set(re.findall(r"; extra (\w+)", README)) <= extras.keys()
    assert serve == ["vllm", "serve", "small"]  # tests/serving run the server
