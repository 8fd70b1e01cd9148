"""`mha2mla finetune` as a user runs it: what it writes, gains, survives and refuses."""

import json
from pathlib import Path

import pytest
import torch
from helpers import original, run_command

from mha2mla_vlm import ConversionConfig, convert, load, load_processor, load_records
from mha2mla_vlm.model.checkpoint import save
from mha2mla_vlm.zoo.chats import write_chats

SMALL = ("--no-bf16", "--batch-size", 2, "--gradient-accumulation", 2, "--eval-samples", 2)
KEYS = {"output", "steps", "examples", "exact_match_before", "exact_match", "kl_before", "kl"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A random original, conversions of it that know their original, and data."""
    folder = tmp_path_factory.mktemp("workspace")
    model, processor = original("qwen2_5_vl")
    save(model, processor, folder / "model")
    (folder / "data").mkdir()
    write_chats("qwen2_5_vl", folder / "data", split="train", samples=16, seed=0)
    records = load_records(folder / "data")[:6]
    model = load(folder / "model")
    for name, config in {
        "latent": ConversionConfig(qk_rope_head_dim=16, d_kv=8),
        "partial": ConversionConfig(qk_rope_head_dim=16, factorization="none"),
    }.items():
        save(convert(model, processor, records, config), processor, folder / name)
    return folder


def command(workspace, checkpoint, output, *options):
    data = workspace / "data" / "chats.jsonl"
    return list(
        map(str, ["finetune", workspace / checkpoint, "--data", data, "-o", output, *SMALL, *options])
    )


def run(monkeypatch, capsys, arguments):
    """Exit code, result and stderr of a command."""
    code, out, err = run_command(monkeypatch, capsys, *arguments)
    return code, out and json.loads(out.splitlines()[-1]), err


def losses(output):
    rows = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.parametrize("checkpoint", ["latent", "partial", "model"])
def test_any_checkpoint_trains_and_loads_alone(monkeypatch, capsys, workspace, tmp_path, checkpoint):
    data = workspace / "data" / "chats.jsonl"
    options = ("--learning-rate", 1e-4, "--distillation", 0.9, "--evaluate-every", 1, "--eval-data", data)
    code, result, err = run(monkeypatch, capsys, command(workspace, checkpoint, tmp_path / "out", *options))
    assert code == 0, err
    assert result.keys() >= KEYS
    assert (result["steps"], result["examples"]) == (4, 16)
    assert result["kl"] < result["kl_before"] or checkpoint == "model"
    trained, before = load(tmp_path / "out"), load(workspace / checkpoint)
    assert trained.dtype == before.dtype
    changed = {n for n, p in trained.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert changed
    assert all("self_attn" in name or "norm" in name for name in changed)
    assert not (tmp_path / "out.partial").exists()
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    settings = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert settings["learning_rate"] == 1e-4
    assert settings["result"]["kl"] == result["kl"]
    assert settings["baseline"] == "model"  # by its name, for the folder is shared
    assert str(workspace) not in (tmp_path / "out" / "finetune.json").read_text()


def test_two_stages_as_published(monkeypatch, capsys, workspace, tmp_path):
    """Partial RoPE, training, MD-SVD, training: the original stays known to the end."""
    stage1, latent, stage2 = (tmp_path / name for name in ("stage1", "latent", "stage2"))
    labels = ("--distillation", 0, "--max-steps", 1, "--baseline", workspace / "model")
    assert run(monkeypatch, capsys, command(workspace, "partial", stage1, "--trains", "v4", *labels))[0] == 0
    data = workspace / "data" / "chats.jsonl"
    arguments = ["convert", stage1, "--data", data, "-o", latent, "--d-kv", 8, "--factorization", "md-svd"]
    code, result, err = run(monkeypatch, capsys, arguments)
    assert code == 0, err
    assert (result["qk_rope_head_dim"], result["kv_lora_rank"]) == (16, 16)
    before, after = load(stage1), load(latent)
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(before.get_parameter(name), after.get_parameter(name))
    code, result, err = run(
        monkeypatch, capsys, command(workspace, latent, stage2, "--trains", "v2", *labels)
    )
    assert code == 0, err
    assert result["kl"] is not None
    assert load(stage2).mla_config.original == "model"


def test_a_killed_run_goes_on_as_if_it_had_not_been(forks, workspace, tmp_path):
    """`kill -9` in the middle: the same losses and weights as an unbroken run's."""
    options = ("--max-steps", 8, "--save-every", 1, "--learning-rate", 1e-3, "--seed", 3)
    whole = command(workspace, "latent", tmp_path / "whole", *options)
    broken = command(workspace, "latent", tmp_path / "broken", *options)
    ended = forks.run(*whole, folder=tmp_path)
    assert ended.code == 0, ended.said
    moment = {"after": "checkpoint-3/trainer_state.json", "below": "", "event": 1}
    assert forks.run(*broken, folder=tmp_path, **moment).code == -9
    partial = tmp_path / "broken.partial"
    assert (partial / "checkpoint-3" / "trainer_state.json").exists()
    unfinished = partial / "checkpoint-7"  # as a kill in the middle of writing leaves one
    unfinished.mkdir(exist_ok=True)
    (unfinished / "trainer_state.json").unlink(missing_ok=True)
    ended = forks.run(*broken, folder=tmp_path)
    assert ended.code == 0, ended.said
    result = json.loads(ended.out.splitlines()[-1])
    expected = json.loads((tmp_path / "whole" / "finetune.json").read_text())["result"]
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    for name in KEYS - {"output"}:
        assert result[name] == expected[name], name
    models = load(tmp_path / "whole").state_dict(), load(tmp_path / "broken").state_dict()
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


def test_other_settings_do_not_go_on_with_an_unfinished_run(monkeypatch, capsys, workspace, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    state = {
        "settings": {"checkpoint": "another", "learning_rate": 1.0},
        "chosen": {"train": [0], "held_out": []},
    }
    (partial / "state.json").write_text(json.dumps(state))
    code, _, err = run(monkeypatch, capsys, command(workspace, "latent", tmp_path / "out"))
    assert code == 2
    assert "other settings (checkpoint" in err
    assert json.loads((partial / "state.json").read_text()) == state


def test_two_processes_are_one_with_twice_the_accumulation(forks, workspace, tmp_path):
    """Two gloo processes, both phases: the same losses, measures and weights."""
    # not AdamW, whose first step makes as much of a gradient that is noise as of any other
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("training_arguments: {optim: sgd}\nlearning_rate: 0.1\n")
    options = ("--max-steps", 4, "--config", recipe, "--alignment", 0.5, "--gradient-checkpointing")
    options += ("--eval-data", workspace / "data" / "chats.jsonl")  # so that 16 chats fill every step
    for name, processes, accumulation in (("one", None, 4), ("two", 2, 2)):
        arguments = command(workspace, "latent", tmp_path / name, *options)
        arguments += ["--gradient-accumulation", accumulation]
        ended = forks.run(*arguments, processes=processes, folder=tmp_path)
        assert ended.code == 0, ended.said[-3000:]
        assert ended.out.count('{"output"') == 1  # one process reports
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-4)
    assert len(one) == 4
    results = [
        json.loads((tmp_path / name / "finetune.json").read_text())["result"] for name in ("one", "two")
    ]
    assert results[1]["kl"] == pytest.approx(results[0]["kl"], rel=1e-3)
    assert results[1]["examples"] == results[0]["examples"] == 32


def test_lora_is_merged_into_an_ordinary_checkpoint(monkeypatch, capsys, workspace, tmp_path):
    pytest.importorskip("peft")
    data = workspace / "data" / "chats.jsonl"
    options = ("--lora-rank", 4, "--learning-rate", 1e-3, "--save-every", 2, "--eval-data", data)
    code, result, err = run(monkeypatch, capsys, command(workspace, "latent", tmp_path / "out", *options))
    assert code == 0, err
    assert result["kl"] < result["kl_before"]
    trained, before = load(tmp_path / "out"), load(workspace / "latent")
    changed = {n for n, p in trained.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert changed
    assert all("_proj" in name for name in changed)


BAD = {
    "unknown policy": (["--trains", "everything"], "unknown policy 'everything'"),
    "share above 1": (["--distillation", "2"], "distillation = 2"),
    "nothing to train": (["--trains", "original-key-value"], "unknown policy"),
    "baseline that is not there": (["--baseline", "nowhere/model"], "nowhere/model"),
    "baseline of another family": (["--baseline", "zoo:llava"], "llava"),
    "recipe that is not there": (["--config", "gone.yaml"], "gone.yaml"),
    "evaluation data that is not there": (["--eval-data", "gone.jsonl"], "gone.jsonl"),
    "all chats too long": (["--max-length", "3"], "0 of 16 chat(s) can be used (16 longer than 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_and_leaves_nothing(monkeypatch, capsys, workspace, tmp_path, case):
    options, message = BAD[case]
    code, result, err = run(monkeypatch, capsys, command(workspace, "latent", tmp_path / "out", *options))
    assert (code, result) == (2, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_arguments_that_transformers_refuses(monkeypatch, capsys, workspace, tmp_path):
    (tmp_path / "recipe.yaml").write_text("training_arguments: {adam_beta7: 0.5}\n")
    arguments = command(workspace, "latent", tmp_path / "out", "--config", tmp_path / "recipe.yaml")
    code, _, err = run(monkeypatch, capsys, arguments)
    assert code == 2
    assert "adam_beta7" in err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_checkpoint_that_does_not_know_its_original(monkeypatch, capsys, workspace, tmp_path):
    """Without a baseline: refused for distillation, trained on labels with a KL of null."""
    nameless = tmp_path / "nameless"
    save(load(workspace / "latent"), None, nameless)
    for file in (workspace / "latent").iterdir():
        if not (nameless / file.name).exists():
            (nameless / file.name).write_bytes(file.read_bytes())
    config = json.loads((nameless / "config.json").read_text())
    del config["mla"]["original"]
    (nameless / "config.json").write_text(json.dumps(config))
    code, _, err = run(monkeypatch, capsys, command(workspace, nameless, tmp_path / "out"))
    assert code == 2
    assert "--baseline" in err
    options = ("--distillation", 0, "--max-steps", 1)
    code, result, err = run(monkeypatch, capsys, command(workspace, nameless, tmp_path / "out", *options))
    assert code == 0, err
    assert (result["kl_before"], result["kl"]) == (None, None)
    assert result["exact_match"] is not None


def test_sharded_weights_are_gathered_where_they_are_read(forks, tmp_path):
    """FSDP2 over two gloo processes: absorbed decoding and gradients as without it."""
    script = Path(__file__).parents[1] / "processes" / "fsdp.py"
    ended = forks.run("qwen2_5_vl", script=str(script), processes=2, folder=tmp_path)
    assert ended.code == 0, ended.said[-3000:]
    assert ended.out.splitlines()[-1] == "same"  # PyTorch 2.9 prints, too


def test_without_autocast_a_bfloat16_checkpoint_trains_in_float32(workspace, tmp_path, monkeypatch, capsys):
    """And is written as it was."""
    folder = tmp_path / "latent"
    save(load(workspace / "latent", dtype=torch.bfloat16), load_processor(workspace / "latent"), folder)
    given = ("finetune", folder, "--data", workspace / "data", *SMALL, "--max-steps", 1)
    given += ("--baseline", workspace / "model")
    code, _, err = run_command(monkeypatch, capsys, *given, "-o", tmp_path / "tuned")
    assert code == 0, err
    assert load(tmp_path / "tuned").dtype == torch.bfloat16
    code, _, err = run_command(monkeypatch, capsys, *given, "-o", tmp_path / "other", "--dtype", "bfloat16")
    assert code == 2
    assert "leave dtype out" in " ".join(err.split())
