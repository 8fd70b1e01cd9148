"""`recipes/run.sh`: what it refuses, the chats it draws, and a whole run in small, twice."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import free_port

from mha2mla_vlm.data.records import message_text
from mha2mla_vlm.data.sources import load_records
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.zoo.chats import write_chats

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = {
    "CONVERSIONS": "12.5:--rotate-at read --budget 0.125",
    "CALIBRATION": "8",
    "HELD_OUT": "3",
    "TRAIN": "4",
    "NEEDED_KL": "0",
    "FINETUNE_OPTIONS": "--max-steps 1 --batch-size 1 --gradient-accumulation 1",
    "BENCH_CONTEXTS": "16",
    "BENCH_BATCHES": "1",
    "BENCH_SECONDS": "0",
    "DEVICE": "cpu",
    "GPUS": "0",
    "TASKS": "",
}


def run(*arguments, timeout=60, **environment):
    given = {"env": os.environ | {"PYTHON": sys.executable} | environment, "timeout": timeout}
    program = ["bash", str(RECIPES / "run.sh"), *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, **given)


@pytest.fixture(scope="module")
def draw():
    spec = importlib.util.spec_from_file_location("draw", RECIPES / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.draw


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_chats("qwen2_5_vl", folder, split="train", samples=16, seed=5)
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("zoo:llava", "zoo"), "three arguments are needed, not 2"),
        (("--dry-run",), "three arguments are needed, not 0"),
        (("Qwen/Qwen2.5-VL-7B-Instruct", "zoo", "out"), "the data zoo goes with a model zoo:NAME"),
        (("zoo:llava", "zoo", RECIPES / "run.sh"), "is not a folder"),
        (("zoo:llava", "zoo", RECIPES), "holds something else"),
    ],
)
def test_bad_arguments_are_refused(arguments, said):
    ended = run(*arguments)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "usage: recipes/run.sh" in ended.stderr


def test_chats_are_dealt_once_each(draw, source, tmp_path):
    counts = {"calibration": 3, "held-out": 2, "train": 3}
    draw(str(source), tmp_path / "chats", counts, every=2, seed=0)
    parts = {part: load_records(tmp_path / "chats" / part) for part in counts}
    assert {part: len(records) for part, records in parts.items()} == counts
    every_second = [as_text(record) for record in load_records(source)[::2]]
    assert sorted(as_text(r) for records in parts.values() for r in records) == sorted(every_second)


def test_too_few_chats_are_refused(draw, source, tmp_path):
    with pytest.raises(InputError, match="has 16 chats of 17 that are asked for"):
        draw(str(source), tmp_path / "chats", {"calibration": 17}, every=1, seed=0)
    assert not (tmp_path / "chats").exists()


def as_text(record):
    return [*map(message_text, record.messages), [image.tobytes() for image in record.load_images()]]


@pytest.mark.slow
def test_a_whole_run_and_again(source, tmp_path):
    given = ("zoo:qwen2_5_vl", source, tmp_path / "out")
    first = run(*given, timeout=1800, PORT=str(free_port()), **SMALL)
    assert first.returncode == 0, first.stdout + first.stderr
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    found = {result["step"]: result for result in map(json.loads, lines)}
    steps = ["data", "estimate-12.5", "convert-12.5", "evaluate-12.5", "finetune-12.5", "bench-12.5"]
    assert [name for name in found if not name.startswith("serve")] == steps
    assert (
        found["convert-12.5"]["bytes_per_token"] <= 0.125 * found["convert-12.5"]["bytes_per_token_original"]
    )
    assert found["finetune-12.5"]["steps"] == 1
    assert "| convert-12.5 | " in (tmp_path / "out" / "results.md").read_text()

    steps = len(found)
    again = run(*given, timeout=300, PORT=str(free_port()), **SMALL)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count(": done before") == steps
    assert (tmp_path / "out" / "results.jsonl").read_text().splitlines() == lines
