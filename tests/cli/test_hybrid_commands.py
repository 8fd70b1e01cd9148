"""Commands that read or train a converted model some of whose layers stay as they were."""

import json

import pytest
import torch
from helpers import answered, original, run_command

from mha2mla_vlm import load, save
from mha2mla_vlm.config import AttentionSizes
from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.pipeline import convert
from mha2mla_vlm.model.checkpoint import load_config

SLOW = ("gemma3", "gemma4-moe", "gemma4_unified", "qwen3_5", "qwen3_5_moe")
TRAINING = ("--no-bf16", "--batch-size", 2, "--learning-rate", 2e-5, "--distillation", 1.0)


@pytest.fixture(params=["gemma4", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def place(request, tmp_path):
    """A folder of an original, its conversion, and chats."""
    model, processor = original(request.param)
    save(model, processor, tmp_path / "original")
    records = answered(request.param, 4, ("image", "two images", "text", "image"))
    small = convert(load(tmp_path / "original"), processor, records, ConversionConfig(budget=0.25))
    save(small, processor, tmp_path / "small")
    lines = []
    for number, record in enumerate(records):
        names = [f"{number}-{i}.png" for i in range(len(record.load_images()))]
        for name, image in zip(names, record.load_images(), strict=True):
            image.save(tmp_path / name)
        lines.append(json.dumps({"messages": record.messages, "images": names}))
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_it_trains_and_loads_alone(place, monkeypatch, capsys):
    data = place / "chats.jsonl"
    options = (*TRAINING, "--eval-data", data, "--eval-samples", 4)
    code, out, err = run_command(
        monkeypatch, capsys, "finetune", place / "small", "--data", data, "-o", place / "tuned", *options
    )
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["kl"] < result["kl_before"]
    trained, before = load(place / "tuned"), load(place / "small")
    changed = {n for n, p in trained.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    for index in AttentionSizes.of(trained.config).growing:
        assert f"model.language_model.layers.{index}.self_attn.kv_b_proj.vision.weight" in changed


def test_its_report_shows_layers_that_stay(place, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    data, page = place / "chats.jsonl", place / "report.html"
    code, _, err = run_command(
        monkeypatch,
        capsys,
        "report",
        place / "small",
        "--data",
        data,
        "--baseline",
        place / "original",
        "-o",
        page,
    )
    assert code == 0, err
    sizes = AttentionSizes.of(load_config(place / "small"))
    assert page.read_text().count("as it was") == len(sizes.left)
