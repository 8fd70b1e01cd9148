"""The shipped models read, and keep reading when converted."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import ONE_FAST, prompt_inputs, whole_logits
from transformers import AutoModelForImageTextToText, AutoProcessor

from mha2mla_vlm import ConversionConfig, convert, evaluate, load, load_processor, zoo_path
from mha2mla_vlm.cli.main import main
from mha2mla_vlm.model.cache.latent import bytes_per_token
from mha2mla_vlm.zoo.chats import zoo_records

DOCS = Path(__file__).parents[2] / "docs" / "zoo.md"


@functools.cache
def shipped(family):
    """A shipped model in float32 and its processor."""
    return load(f"zoo:{family}", dtype=torch.float32), load_processor(f"zoo:{family}")


@functools.cache
def calibration(family):
    """Chats about training scans."""
    return zoo_records(family, split="train", samples=48, seed=1)


@functools.cache
def accuracy(family):
    """Accuracy of the original on a sample of the images that docs/zoo.md counts."""
    model, processor = shipped(family)
    return evaluate(model, processor, zoo_records(family, split="test", samples=80, seed=0))


def documented(family):
    """Accuracies on all 500 images, from the table of docs/zoo.md."""
    text = DOCS.read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `zoo:{family}` \|((?: [\d.]+% \|)+)$", text, re.MULTILINE)
    values = [float(cell) / 100 for cell in re.findall(r"[\d.]+", row)]
    return dict(zip(("exact_match", "place", "count", "largest", "read"), values, strict=True))


@ONE_FAST
def test_accuracy_is_what_the_documentation_says(family):
    measured, said = accuracy(family), documented(family)
    spread = 3 * (said["exact_match"] * (1 - said["exact_match"]) / measured["answers"]) ** 0.5
    assert abs(measured["exact_match"] - said["exact_match"]) < spread + 0.01
    place = measured["by_kind"]["place"]
    spread = 3 * (said["place"] * (1 - said["place"]) / place["answers"]) ** 0.5
    assert abs(place["exact_match"] - said["place"]) < spread + 0.01


def test_plain_transformers_loads_it_whole(family):
    folder = zoo_path(family)
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.model_type == family
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.chat_template
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    most = 11 if family == "qwen3_vl" else 10  # its deepstack has mergers of its own
    assert sizes["model.safetensors"] <= most * 2**20
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= sizes.keys()
    inputs = prompt_inputs(family, processor, ["image"])
    output = model.generate(**inputs)  # ends by itself: the generation config knows the end of an answer
    text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert re.fullmatch(r"\s*\d\s*", text)


@ONE_FAST
def test_full_rank_conversion_keeps_the_logits_and_the_accuracy(family):
    model, processor = shipped(family)
    converted = convert(
        model, processor, calibration(family)[:12], ConversionConfig(qk_rope_head_dim=64, d_kv=64)
    )
    inputs = prompt_inputs(family, processor, ["two images"])
    expected = whole_logits(model, inputs)
    torch.testing.assert_close(whole_logits(converted, inputs), expected, atol=1e-3, rtol=1e-3)
    measured = evaluate(converted, processor, zoo_records(family, split="test", samples=80, seed=0))
    assert abs(measured["exact_match"] - accuracy(family)["exact_match"]) < 0.01


@pytest.mark.slow
def test_md_svd_beats_weight_svd_at_low_rank(family):
    model, processor = shipped(family)
    kl = {}
    for method in ("weight-svd", "md-svd"):
        config = ConversionConfig(qk_rope_head_dim=64, d_kv=12, fold=False, factorization=method)
        kl[method] = convert(model, processor, calibration(family), config).mla_config.kl["factorization"]
    assert kl["md-svd"] < kl["weight-svd"]


@ONE_FAST
def test_the_default_beats_the_published_method_at_the_same_bytes(family):
    model, processor = shipped(family)
    published = ConversionConfig(
        qk_rope_head_dim=16, d_kv=16, rope_selection="mkl", fold=False, factorization="md-svd"
    )
    made = [
        convert(model, processor, calibration(family)[:24], config)
        for config in (published, ConversionConfig(budget=0.25))
    ]
    sizes = [bytes_per_token(small.config) for small in made]
    assert sizes[1] <= sizes[0]
    theirs, ours = (small.mla_config.kl["factorization"] for small in made)
    assert ours < 0.3 * theirs
    chosen = made[1].mla_config
    assert len(chosen.predicted_kl) == len(chosen.kv_lora_rank) == 4
    assert len(set(chosen.kv_lora_rank)) > 1  # layers differ in what they need
    assert "read" in chosen.rotate_at


def test_demo_measures_the_cache(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("mha2mla_vlm.demo.CALIBRATION_CHATS", 32)  # of 128: a quarter of the time
    monkeypatch.setattr("sys.argv", ["mha2mla", "demo", "--samples", "12", "-o", str(tmp_path / "demo")])
    with pytest.raises(SystemExit) as ended:
        main()
    output = capsys.readouterr()
    assert ended.value.code == 0, output.err
    result = json.loads(output.out.splitlines()[-1])
    page = Path(result.pop("report"))
    assert page == tmp_path / "demo" / "report.html"
    assert page.read_text().count("<svg") == 6  # three plots, for wide windows and for narrow ones
    assert "2.0 kB</div>" in page.read_text()  # of the original, in bfloat16 as all that is counted
    assert json.loads((tmp_path / "demo" / "demo.json").read_text()) == result
    original, quarter, at_read, mixed = result["rows"]
    for row, share in ((original, 1.0), (quarter, 0.25), (at_read, 0.125), (mixed, 0.0625)):
        assert row["bytes_per_token"] <= share * original["bytes_per_token"]
        assert row["cache_bytes"] == row["bytes_per_token"] * row["cached_tokens"]
    assert mixed["exact_match"] > 0.9 * original["exact_match"]
    assert quarter["kl"] < 0.5
    for smaller in (at_read, mixed):
        assert 0 < smaller["kl"] < 0.5 * quarter["kl"]
