"""What a result was made of: named without a path of this machine, and found beside the result."""

import json
import shutil

import pytest
from forks import COMMANDS, contents

from mha2mla_vlm import ConversionConfig, convert, load, load_processor, load_records
from mha2mla_vlm.model.checkpoint import save
from mha2mla_vlm.model.origin import original_of, shared_name


@pytest.fixture
def folder(workspace_for_forks, tmp_path):
    """A folder with an original and chats, by its whole path."""
    for name in ("model", "data"):
        shutil.copytree(workspace_for_forks / name, tmp_path / name)
    return tmp_path


def absolute(folder, name):
    """A command with whole paths for names."""
    return [folder / part if part in ("model", "data", "small") else part for part in COMMANDS[name]]


def test_no_path_of_this_machine_is_in_a_result(folder, forks, tmp_path):
    more = ("--eval-data", folder / "data")
    ended = forks.run(*absolute(folder, "convert"), folder / "small", *more, folder="/")
    assert ended.code == 0, ended.said
    ended = forks.run(*absolute(folder, "finetune"), folder / "tuned", folder="/")
    assert ended.code == 0, ended.said
    for name in ("small", "tuned"):
        written = contents(folder / name)
        assert [path for path, data in written.items() if str(tmp_path).encode() in data] == []
        assert json.loads(written["config.json"])["mla"]["original"] == "model"
    assert "Converted from `model`" in (folder / "small" / "README.md").read_text()
    assert "base_model" not in (folder / "small" / "README.md").read_text()  # which is an id of the hub
    settings = json.loads((folder / "tuned" / "finetune.json").read_text())
    assert [settings[key] for key in ("checkpoint", "data", "baseline")] == ["small", "data", "model"]


def test_it_is_looked_for_beside_the_result(folder, forks, tmp_path):
    model, processor = load(folder / "model"), load_processor(folder / "model")
    records = load_records(folder / "data")
    save(
        convert(model, processor, records, ConversionConfig(qk_rope_head_dim=16, d_kv=8)),
        processor,
        folder / "small",
    )
    assert original_of(folder / "small") == str(folder / "model")
    report = ("report", folder / "small", "--data", folder / "data", "--samples", 1, "--layer-samples", 0)
    ended = forks.run(*report, folder="/")
    assert ended.code == 0, ended.said
    (folder / "model").rename(folder / "elsewhere")
    tune = ("finetune", folder / "small", "--data", folder / "data", "-o", folder / "out")
    for command, option in ((report, "--baseline"), (tune, "--baseline")):
        ended = forks.run(*command, folder="/")
        assert ended.code == 2
        assert f"was converted from 'model', which is not beside it; give {option} MODEL" in ended.said
    ended = forks.run(*report, "--baseline", folder / "elsewhere", folder="/")
    assert ended.code == 0, ended.said


@pytest.mark.parametrize("name", ["OWNER/NAME", "zoo:llava"])
def test_names_that_hold_everywhere_stay(name):
    assert shared_name(name) == name
