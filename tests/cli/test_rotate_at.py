"""The commands on a model whose keys are rotated when they are read."""

import json

from helpers import ONE_FAST, run_command

from mha2mla_vlm import load, load_processor
from mha2mla_vlm.conversion.describe import layers_table
from mha2mla_vlm.zoo.chats import zoo_records


def test_convert_inspect_evaluate_generate_finetune(monkeypatch, capsys, tmp_path):
    data, small, tuned = tmp_path / "data", tmp_path / "small", tmp_path / "tuned"

    def command(*arguments):
        code, out, err = run_command(monkeypatch, capsys, *arguments)
        assert code == 0, err
        return json.loads(out.splitlines()[-1])

    command("zoo", "data", "llava_next", "-o", data, "--samples", "8", "--split", "train")
    given = ("--data", data, "-o", small, "--rotate-at", "read")
    planned = command("convert", "zoo:llava_next", *given, "--dry-run")
    made = command("convert", "zoo:llava_next", *given)
    assert planned["bytes_per_token"] <= 0.125 * made["bytes_per_token_original"]
    assert made["bytes_per_token"] <= 0.125 * made["bytes_per_token_original"]
    assert made["qk_rope_head_dim"] == 64
    assert list(made["kl_by_step"]) == ["factorization"]
    seen = command("inspect", small)
    assert seen["rotate_at"] == "read"
    assert list(layers_table(seen).columns[6].cells) == ["all"] * 4
    found = command("evaluate", small, "--data", data, "--baseline", "zoo:llava_next")
    assert found["kl"] < 0.05
    assert found["agreement"] > 0.8
    image = data / "images" / "000000-0.png"
    answer = command("generate", small, "--image", image, "--prompt", "Read all digits.", "--cache-bits", "8")
    assert answer["cache_bytes"] > 0
    options = ("--max-steps", "2", "--batch-size", "2", "--no-bf16", "--baseline", "zoo:llava_next")
    assert command("finetune", small, "--data", data, "-o", tuned, *options)["steps"] == 2
    timed = command("bench", small, "--baseline", "zoo:llava_next", "--context", "600", "--seconds", "0.1")
    assert timed["rows"][0]["cache_bytes"] == timed["rows"][0]["cache_bytes_formula"]
    assert timed["rows"][0]["attention_ratio"] > 0
    again = ("convert", small, "--data", data, "-o", tmp_path / "again", "--rotate-at", "read")
    code, _, err = run_command(monkeypatch, capsys, *again)
    assert code == 2
    assert "converted already" in err


def test_modes_are_chosen_by_layer(monkeypatch, capsys, tmp_path):
    data, small = tmp_path / "data", tmp_path / "small"

    def command(*arguments):
        code, out, err = run_command(monkeypatch, capsys, *arguments)
        assert code == 0, err
        return json.loads(out.splitlines()[-1]), " ".join(err.split())

    command("zoo", "data", "llava", "-o", data, "--samples", "8", "--split", "train")
    given = ("--data", data, "-o", small, "--rotate-at", "auto", "--max-decode-cost", "10")
    planned, said = command("convert", "zoo:llava", *given, "--dry-run")
    assert "modes and sizes are chosen by measuring" in said
    assert planned["bytes_per_token"] <= 0.125 * planned["bytes_per_token_original"]
    made, said = command("convert", "zoo:llava", *given)
    assert made["bytes_per_token"] <= 0.125 * made["bytes_per_token_original"]
    assert set(made["rotate_at"]) == {"write", "read"}
    assert made["decode_cost"] <= 10
    assert "rotated at" in said
    described, table = command("inspect", small)
    assert described["rotate_at"] == made["rotate_at"]
    assert described["decode_cost"] == made["decode_cost"]
    assert "rotated at" in table
    assert "write in" in (small / "README.md").read_text()
    found, _ = command("evaluate", small, "--data", data, "--baseline", "zoo:llava")
    assert found["kl"] < 1.0


@ONE_FAST
def test_the_shipped_models_lose_little_at_an_eighth(family):
    """KL on chats that calibration never saw, at 12.5% of the cache with positions."""
    from mha2mla_vlm import ConversionConfig, bytes_per_token, convert, evaluate

    model, processor = load(f"zoo:{family}", dtype="float32"), load_processor(f"zoo:{family}")
    chats = zoo_records(family, split="train", samples=48, seed=1)
    small = convert(model, processor, chats, ConversionConfig(rotate_at="read"))
    assert bytes_per_token(small.config) <= 0.125 * bytes_per_token(model.config)
    found = evaluate(small, processor, zoo_records(family, split="test", samples=24, seed=0), baseline=model)
    assert found["kl"] < 0.003
