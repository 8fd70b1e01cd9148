"""Bad input: one clear line on stderr, exit code 2, nothing left on disk."""

import copy
import json
from pathlib import Path

import pytest
from helpers import original, random_mla, run_command
from PIL import Image

from mha2mla_vlm.evaluation.answers import check_baseline
from mha2mla_vlm.model.checkpoint import save
from mha2mla_vlm.zoo.chats import write_chats


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a random original model and good data."""
    folder = tmp_path_factory.mktemp("workspace")
    model, processor = original("qwen2_5_vl")
    save(model, processor, folder / "model")
    (folder / "data").mkdir()
    write_chats("qwen2_5_vl", folder / "data", split="test", samples=4, seed=0)
    return folder


def write_data(path, entry):
    path.write_text(json.dumps(entry) + "\n")
    return path


def chat(*images):
    content = [{"type": "image"}, {"type": "text", "text": "Read all digits."}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "7"}]
    return {"messages": messages, "images": list(images)}


CONVERT = {
    "unknown selection": (["--rope-selection", "best"], "best"),
    "unknown factorization": (["--factorization", "qr"], "qr"),
    "odd R": (["--qk-rope-head-dim", "7"], "7"),
    "R larger than D": (["--qk-rope-head-dim", "66"], "66"),
    "R zero": (["--qk-rope-head-dim", "0"], "0"),
    "rank too large": (["--d-kv", "500"], "d_kv up to 96"),
    "rank zero": (["--d-kv", "0"], "0"),
    "d_kv without factorization": (["--factorization", "none", "--d-kv", "8"], "none"),
    "one sample": (["--samples", "1"], "1"),
    "budget over 1": (["--budget", "1.2"], "budget = 1.2"),
    "budget too small": (["--budget", "0.01"], "the least for these sizes is"),
    "budget and both sizes": (
        ["--budget", "0.5", "--qk-rope-head-dim", "32", "--d-kv", "8"],
        "leave one of them out",
    ),
    "budget without ranks": (["--budget", "0.5", "--factorization", "none"], "no ranks to allocate"),
}


@pytest.mark.parametrize("case", CONVERT)
def test_convert_refuses_settings(monkeypatch, capsys, workspace, case):
    options, named = CONVERT[case]
    output = workspace / "out"
    command = ["convert", workspace / "model", "--data", workspace / "data", "-o", output, *options]
    refused(*run_command(monkeypatch, capsys, *command), named)
    assert not output.exists()


def refused(code, out, err, named):
    """The contract of bad input."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert named in lines[0]


def make_missing_image(folder):
    return write_data(folder / "bad.jsonl", chat("nowhere.png")), "nowhere.png"


def make_corrupt_image(folder):
    Image.new("L", (48, 48)).save(folder / "whole.png")
    (folder / "torn.png").write_bytes((folder / "whole.png").read_bytes()[:60])
    return write_data(folder / "bad.jsonl", chat("torn.png")), "torn.png"


def make_image_count(folder):
    return write_data(folder / "bad.jsonl", chat()), "0 image(s) for 1 image placeholder(s)"


def make_empty(folder):
    (folder / "bad.jsonl").write_text("")
    return folder / "bad.jsonl", "no records"


def make_absent(folder):
    return folder / "absent.jsonl", "does not exist"


@pytest.mark.parametrize(
    "make", [make_missing_image, make_corrupt_image, make_image_count, make_empty, make_absent]
)
@pytest.mark.parametrize("command", ["convert", "evaluate"])
def test_bad_data_is_refused(monkeypatch, capsys, workspace, tmp_path, command, make):
    data, named = make(tmp_path)
    output = tmp_path / "out"
    extra = ["-o", output] if command == "convert" else []
    result = run_command(monkeypatch, capsys, command, workspace / "model", "--data", data, *extra)
    refused(*result, named)
    assert not output.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_unknown_family_is_refused_with_the_supported_ones(monkeypatch, capsys, workspace, tmp_path):
    model = tmp_path / "bert"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    command = ["convert", model, "--data", workspace / "data", "-o", tmp_path / "out"]
    code, out, err = run_command(monkeypatch, capsys, *command)
    refused(code, out, err, "bert")
    assert all(family in err for family in ("qwen2_5_vl", "llava_next", "llava"))
    assert not (tmp_path / "out").exists()


def test_output_that_is_not_empty_is_refused(monkeypatch, capsys, workspace, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious.txt").write_text("keep me")
    for command in (
        ["convert", workspace / "model", "--data", workspace / "data", "-o", output],
        ["zoo", "data", "llava", "-o", output],
        ["zoo", "build", "llava", "-o", output],
        ["demo", "-o", output],
    ):
        refused(*run_command(monkeypatch, capsys, *command), str(output))
    assert [path.name for path in output.iterdir()] == ["precious.txt"]


def test_truncated_weights_are_refused(monkeypatch, capsys, workspace, tmp_path):
    model, processor = original("qwen2_5_vl")
    folder = save(model, processor, tmp_path / "torn")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])
    command = ["convert", folder, "--data", workspace / "data", "-o", tmp_path / "out"]
    refused(*run_command(monkeypatch, capsys, *command), str(folder))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["inspect", "MODEL"], "not a converted model"),
        (["inspect", "no/such/folder"], "no/such/folder"),
        (["demo", "--model", "gpt"], "gpt"),
        (["zoo", "data", "gpt", "-o", "OUT"], "gpt"),
        (["generate", "MODEL", "--prompt", "x", "--image", "absent.png"], "absent.png"),
        (["generate", "MODEL", "--prompt", "x", "--device", "abacus"], "abacus"),
        (["evaluate", "zoo:gpt", "--data", "DATA"], "zoo:gpt"),
        (["import-published", "MODEL", "--ranks", "absent.pth", "-o", "OUT"], "no 'mha2mla'"),
        (["import-published", "PUBLISHED", "--ranks", "absent.pth", "-o", "OUT"], "absent.pth"),
        (["import-published", "absent", "--ranks", "absent.pth", "-o", "OUT"], "absent/config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_other_commands_refuse(monkeypatch, capsys, workspace, tmp_path, command, named):
    places = {"MODEL": workspace / "model", "DATA": workspace / "data", "OUT": tmp_path / "out"}
    places["PUBLISHED"] = Path(__file__).parents[1] / "fixtures" / "published" / "llava" / "stage2"
    command = [places.get(word, word) for word in command]
    refused(*run_command(monkeypatch, capsys, *command), named)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("convert --no-such-option", "--no-such-option"),
        ("convert", "mha2mla convert --help"),
        ("convert a b --data d -o out", "b"),
        ("convret", "convret"),
        ("evaluate model --data data --samples many", "--samples"),
        ("evaluate model --data data --dtype best", "best"),
    ],
)
def test_usage_errors_are_one_line(monkeypatch, capsys, command, named):
    refused(*run_command(monkeypatch, capsys, *command.split()), named)


def test_outputs_that_cannot_be_made_are_refused_before_work(monkeypatch, capsys, workspace, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for output in (".", "file", "file/sub"):
        command = ["convert", workspace / "model", "--data", workspace / "data", "-o", output]
        refused(*run_command(monkeypatch, capsys, *command), output)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture(scope="module")
def baselines(tmp_path_factory):
    """Folders without weights, of originals that take other inputs than the `workspace` model."""
    folder = tmp_path_factory.mktemp("baselines")
    for name, family in (("llava", "llava"), ("tokens", "qwen2_5_vl"), ("images", "qwen2_5_vl")):
        model, processor = original(family)
        if name == "images":
            model.config.vision_config.patch_size = 4
        model.config.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    path = folder / "tokens" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))
    return folder


BASELINES = {
    "llava": "the baseline has family llava, the model qwen2_5_vl",
    "tokens": "give a baseline with the same vocabulary",
    "images": "the baseline has patch_size 4, the model",
}


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("command", ["evaluate", "report", "bench"])
def test_a_baseline_that_takes_other_inputs_is_refused(
    monkeypatch, capsys, workspace, baselines, tmp_path, command, name
):
    """Before weights are loaded: the baseline has none."""
    checkpoint = workspace / "model"
    if command == "report":
        save(random_mla("qwen2_5_vl")[0], original("qwen2_5_vl")[1], checkpoint := tmp_path / "small")
    data = [] if command == "bench" else ["--data", workspace / "data"]
    command = [command, checkpoint, *data, "--baseline", baselines / name]
    refused(*run_command(monkeypatch, capsys, *command), BASELINES[name])


def test_a_vocabulary_may_have_tokens_beyond_the_others(tmp_path):
    model, processor = original("qwen2_5_vl")
    for name in ("plain", "longer"):
        model.config.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        processor = copy.deepcopy(processor)
        processor.tokenizer.add_tokens(["<one more>"])
    check_baseline(str(tmp_path / "plain"), str(tmp_path / "longer"))
    check_baseline(str(tmp_path / "longer"), str(tmp_path / "plain"))


@pytest.mark.parametrize("mla", [[], {"qk_rope_head_dim": "8"}, {"qk_rope_head_dim": [8]}], ids=str)
def test_a_config_that_no_conversion_wrote_is_refused(monkeypatch, capsys, workspace, tmp_path, mla):
    config = json.loads((workspace / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_5_vl_mla", "mla": mla}))
    refused(*run_command(monkeypatch, capsys, "inspect", tmp_path), "")


def test_inspecting_truncated_weights_is_refused(monkeypatch, capsys, tmp_path):
    model, processor = random_mla("llava")
    folder = save(model, processor, tmp_path / "torn")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])
    refused(*run_command(monkeypatch, capsys, "inspect", folder), "model.safetensors")
