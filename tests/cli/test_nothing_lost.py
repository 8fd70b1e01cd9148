"""Nothing of the user's is lost, nothing foreign runs, and no broken weights answer."""

import io
import json
import os
import shutil
import struct
import sys
import zlib

import pytest
import torch
from helpers import original, random_mla, run_command
from PIL import Image
from safetensors.torch import load_file, save_file

from mha2mla_vlm import InputError, Record, load, load_processor, save
from mha2mla_vlm.conversion.work_folder import WorkFolder
from mha2mla_vlm.data.records import MAX_PIXELS
from mha2mla_vlm.evaluation.generation import answer, prompt_record
from mha2mla_vlm.zoo.chats import write_chats

SIZES = ("--qk-rope-head-dim", "16", "--d-kv", "8")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a random original, a conversion of random weights, and chats."""
    folder = tmp_path_factory.mktemp("workspace")
    save(*original("llava"), folder / "model")
    save(*random_mla("llava"), folder / "small")
    (folder / "data").mkdir()
    write_chats("llava", folder / "data", split="train", samples=5, seed=0)
    return folder


def command(workspace, output, *more, model="model"):
    data = workspace / "data" / "chats.jsonl"
    return ["convert", workspace / model, "--data", data, "-o", output, *SIZES, *more]


def copied(workspace, name, target):
    shutil.copytree(workspace / name, target)
    return target


def changed(folder, change):
    """Change the weights of a folder in place."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def refused(code, out, err, *named):
    """One clear line."""
    text = " ".join(err.split())
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    for word in named:
        assert word in text


def test_code_of_a_checkpoint_never_runs(monkeypatch, capsys, tmp_path):
    folder, trace = tmp_path / "foreign", tmp_path / "trace"
    folder.mkdir()
    (folder / "code.py").write_text(
        f"from pathlib import Path\nPath({str(trace)!r}).touch()\nclass C: pass\n"
    )
    autos = dict.fromkeys(("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor"), "code.C")
    (folder / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": autos}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\n"))
    refused(*run_command(monkeypatch, capsys, "inspect", folder), "foreign")
    assert not trace.exists()
    with pytest.raises(InputError):
        load_processor(folder)
    assert not trace.exists()


def huge_png(width, height):
    """The beginning of an image of that size: enough to open it, not to decode it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 64)
    chunks = [header, data, b"IEND"]
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


IMAGES = {
    "a program for Ghostscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", "none of PNG"),
    "a format that is not taken": (b"P5 4 4 255\n" + b"\0" * 16, "none of PNG"),
    "more pixels than are decoded": (huge_png(10_000, 10_000), "10000 x 10000 pixels"),
    "far more pixels": (huge_png(100_000, 100_000), "pixels"),
    "nothing": (b"", "cannot be read"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images_that_are_not_opened(case, tmp_path, recwarn):
    content, named = IMAGES[case]
    path = tmp_path / "image.png"
    path.write_bytes(content)
    for image in (path, content):
        with pytest.raises(InputError, match=named):
            prompt_record("Read.", [image]).load_images()
    assert not recwarn.list


def test_the_largest_image_is_read():
    """To the pixel, and no warning: the limit is where Pillow begins to warn."""
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS
    buffer = io.BytesIO()
    Image.new("1", (MAX_PIXELS // 5, 5)).save(buffer, "PNG")
    (read,) = prompt_record("Read.", [buffer.getvalue()]).load_images()
    assert read.size == (MAX_PIXELS // 5, 5)


def test_a_pipe_is_no_image(tmp_path):
    """It would be waited for."""
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="is not a file"):
        prompt_record("Read.", [tmp_path / "pipe.png"]).load_images()


def test_a_folder_for_states_that_is_not_ours_is_left_alone(monkeypatch, capsys, workspace, tmp_path):
    for name in ("small.states", "notes"):
        (tmp_path / "spill" / name).mkdir(parents=True)
        (tmp_path / "spill" / name / "mine.txt").write_text("mine")
    given = command(workspace, tmp_path / "small", "--spill", tmp_path / "spill")
    code, _, err = run_command(monkeypatch, capsys, *given)
    assert code == 0, err
    assert sorted(p.name for p in (tmp_path / "spill").iterdir()) == ["notes", "small.states"]
    assert (tmp_path / "spill" / "small.states" / "mine.txt").read_text() == "mine"


def test_two_conversions_share_a_spill_and_no_states(tmp_path):
    spill = tmp_path / "spill"
    first, second = (
        WorkFolder(tmp_path / place / "out", {}, resume=False, spill=spill) for place in ("x", "y")
    )
    first.states["original", 0, 0] = torch.zeros(1)
    second.states["original", 0, 0] = torch.ones(1)
    assert first.states["original", 0, 0] == 0
    other = next(spill.glob("out-*.states"))
    shutil.rmtree(tmp_path / "x")
    (other / ".mha2mla").write_text("someone else")
    with pytest.raises(InputError, match="was not made for"):
        [WorkFolder(tmp_path / place / "out", {}, resume=True, spill=spill) for place in ("x", "y")]


@pytest.mark.parametrize("content", ["mine.txt", "progress.json"])
@pytest.mark.parametrize("word", ["convert", "finetune"])
def test_a_work_folder_that_is_not_ours_is_refused(monkeypatch, capsys, workspace, tmp_path, content, word):
    folder = tmp_path / "out.partial"
    folder.mkdir()
    (folder / content).write_text("mine")
    given = command(workspace, tmp_path / "out", "--resume")
    if word == "finetune":
        given = ["finetune", workspace / "small", "--data", workspace / "data", "-o", tmp_path / "out"]
        given += ["--baseline", workspace / "model"]
    refused(*run_command(monkeypatch, capsys, *given), "out.partial", "choose another output")
    assert (folder / content).read_text() == "mine"
    assert [p.name for p in folder.iterdir()] == [content]


SHARD = {"renamed": "model-00002-of-00005.safetensors", "event": 1}  # the moment a shard gets its name


def test_a_run_is_not_resumed_with_other_weights(monkeypatch, capsys, forks, workspace, tmp_path):
    copied(workspace, "model", tmp_path / "model")
    given = ["convert", tmp_path / "model", *command(workspace, tmp_path / "out")[2:]]
    assert forks.run(*given, folder=tmp_path, **SHARD).code == -9
    assert (tmp_path / "out.partial").is_dir()
    changed(tmp_path / "model", lambda weights: next(iter(weights.values())).flatten()[:1].add_(1))
    refused(*run_command(monkeypatch, capsys, *given, "--resume"), "begun with another weights")


def named(weights, suffix):
    """The first language-model weight of that name; originals have those of checkpoints, not of modules."""
    return next(key for key in weights if key.endswith(suffix) and "vision" not in key)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_says_that_work_is_kept(forks, workspace, tmp_path, name):
    given = command(workspace, tmp_path / "out")
    ended = forks.run(*given, folder=tmp_path, signal=name, **SHARD)
    assert ended.code == 130
    assert ended.out == ""
    assert "interrupted: what is done is kept in" in ended.said
    assert "--resume" in ended.said
    assert "Traceback" not in ended.said
    ended = forks.run(*given, "--resume", folder=tmp_path)
    assert ended.code == 0, ended.said


def test_files_get_the_modes_of_new_files(workspace, tmp_path):
    """Those that safetensors writes are for their owner alone."""
    (tmp_path / "new").touch()
    mode = (tmp_path / "new").stat().st_mode
    assert {path.stat().st_mode for path in (workspace / "small").iterdir()} == {mode}


def extra(weights):
    weights["model.language_model.layers.0.self_attn.k_norm.weight"] = torch.ones(64)


def in_eight_bits(weights):
    key = named(weights, "self_attn.q_proj.weight")
    weights[key] = weights[key].mul(10).to(torch.int8)


@pytest.mark.parametrize(("change", "named"), [(extra, "unexpected keys"), (in_eight_bits, "I8")])
def test_weights_of_an_original_are_all_of_it(workspace, tmp_path, change, named):
    folder = changed(copied(workspace, "model", tmp_path / "model"), change)
    with pytest.raises(InputError, match=named):
        load(folder)


PAIRS = {
    "negative": lambda pairs: pairs.sub(100),
    "repeated": torch.zeros_like,
    "too large": lambda pairs: pairs.add(32),
    "not whole": lambda pairs: pairs.float(),
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairs_that_are_none_are_refused(workspace, tmp_path, case):
    def change(weights):
        for key in weights:
            if key.endswith("rope_pairs"):
                weights[key] = PAIRS[case](weights[key])

    folder = changed(copied(workspace, "small", tmp_path / "small"), change)
    with pytest.raises(InputError, match="rope_pairs"):
        load(folder)


@pytest.mark.parametrize("name", ["model", "small"])
def test_weights_that_are_no_numbers_do_not_answer(workspace, tmp_path, name):
    def change(weights):
        weights[named(weights, "mlp.up_proj.weight")].fill_(torch.nan)

    folder = changed(copied(workspace, name, tmp_path / name), change)
    asked = prompt_record("Read all digits.")
    with pytest.raises(InputError, match="not finite"):
        answer(load(folder), load_processor(folder), asked, max_new_tokens=2)


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8", "bitsandbytes"])
def test_quantised_models_are_refused_by_name(monkeypatch, capsys, workspace, tmp_path, method):
    folder = copied(workspace, "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))
    given = ["convert", folder, *command(workspace, tmp_path / "out")[2:]]
    refused(*run_command(monkeypatch, capsys, *given), method, "quantise the result")
    assert not list(tmp_path.glob("out*"))


DEEP = "[" * 100_000
QUESTION = '{"role": "user", "content": "?"}'
ANSWER = '{"role": "assistant", "content": "7"}'
CHATS = {
    "numbers of thousands of digits": ('{"messages": ' + "9" * 10_000 + "}", "broken JSON"),
    "nesting without end": ('{"messages": ' + DEEP, "broken JSON"),
    "a list that nests without end": (DEEP, "broken JSON"),
    "half a surrogate": (
        '{"messages": [{"role": "user", "content": "\\ud800"}, ' + ANSWER + "]}",
        "surrogate",
    ),
    "an answer first": ('{"messages": [' + ANSWER + ", " + QUESTION + "]}", "begins with an answer"),
}


@pytest.mark.parametrize("case", CHATS)
def test_chats_that_are_none(monkeypatch, capsys, workspace, tmp_path, case):
    text, word = CHATS[case]
    (tmp_path / "chats.jsonl").write_text(text + "\n")
    given = [
        "convert",
        workspace / "model",
        "--data",
        tmp_path / "chats.jsonl",
        "-o",
        tmp_path / "out",
        *SIZES,
    ]
    refused(*run_command(monkeypatch, capsys, *given), word)
    assert not list(tmp_path.glob("out*"))


def test_a_placeholder_typed_into_the_text_is_found_before_training(monkeypatch, capsys, workspace, tmp_path):
    chat = {"messages": [{"role": "user", "content": "What is <image>?"}, json.loads(ANSWER)]}
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(chat)}\n" * 4)
    given = ["finetune", workspace / "small", "--data", tmp_path / "chats.jsonl", "-o", tmp_path / "out"]
    given += ["--baseline", workspace / "model", "--eval-samples", 1]
    refused(*run_command(monkeypatch, capsys, *given), "1 times <image>", "line 1")


OPTIONS = {
    "a device that computes nothing": (["--device", "meta"], "device 'meta'"),
    "a processor that there is not": (["--device", "cpu:3"], "device 'cpu:3'"),
    "chats to report on that are not there": (["--eval-data", "nowhere.jsonl"], "nowhere.jsonl"),
    "a spill that is a file": (["--spill", __file__], "--spill"),
    "a long name": (["-o", "x" * 300], "File name too long"),
    "an output under a file": (["-o", f"{__file__}/out"], "cannot be made"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_are_refused_before_work(monkeypatch, capsys, workspace, tmp_path, case):
    options, word = OPTIONS[case]
    monkeypatch.chdir(tmp_path)
    refused(*run_command(monkeypatch, capsys, *command(workspace, tmp_path / "out", *options)), word)
    assert not list(tmp_path.iterdir())


def test_a_record_checks_no_image_before_it_is_asked(tmp_path):
    """Reading the same chat twice opens its image twice, and finds it gone."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    chat = Record(messages=[{"role": "user", "content": content}], images=[tmp_path / "a.png"])
    assert chat.load_images()[0].size == (8, 8)
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match="does not exist"):
        chat.load_images()
