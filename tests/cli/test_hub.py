"""Models on their way to the hub and read from there, against one on loopback."""

import json
import os
import subprocess
import sys

import hub
import pytest
from helpers import original
from huggingface_hub import ModelCard

from mha2mla_vlm.model.checkpoint import save
from mha2mla_vlm.zoo.chats import write_chats

FAMILY = "llava"
SIZES = ("--rope-dim", "16", "--d-kv", "8")


@pytest.fixture
def server():
    """A hub that runs while a test does."""
    running = hub.start()
    yield running
    running.shutdown()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A random original and chats."""
    folder = tmp_path_factory.mktemp("hub")
    save(*original(FAMILY), folder / "model")
    (folder / "data").mkdir()
    write_chats(FAMILY, folder / "data", split="train", count=4, seed=0)
    return folder


def mha2mla(server, home, *arguments, token="hf_test"):
    """The command in a process whose hub is the server's."""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    environment |= {"HF_TOKEN": token} if token else {}
    program = [sys.executable, "-m", "mha2mla_vlm", *map(str, arguments)]
    return subprocess.run(program, env=environment, capture_output=True, text=True)


def convert(workspace, output, *more):
    data = workspace / "data" / "chats.jsonl"
    return ("convert", workspace / "model", "--data", data, "-o", output, *SIZES, *more)


def shards_asked_for(server):
    """Shards that were read as a whole."""
    return [
        path
        for how, path, part in server.asked
        if how == "GET" and path.endswith(".safetensors") and not part
    ]


def test_a_converted_model_is_sent_and_read_from_there(server, workspace, tmp_path):
    sent = mha2mla(
        server, tmp_path / "home", *convert(workspace, tmp_path / "small", "--push-to-hub", "me/small")
    )
    assert sent.returncode == 0, sent.stderr
    assert json.loads(sent.stdout)["pushed"].endswith("/me/small")
    written = {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()}
    assert {name: server.files.get(name) for name in written} == written

    card = ModelCard(written["README.md"].decode())
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "mha2mla-vlm" in card.data.tags
    assert "(18.8%)" in card.text
    assert "Built with Llama" in card.text

    server.asked.clear()
    seen = mha2mla(server, tmp_path / "other", "inspect", "me/small")
    assert seen.returncode == 0, seen.stderr
    local = mha2mla(server, tmp_path / "other", "inspect", tmp_path / "small")
    assert json.loads(seen.stdout) == json.loads(local.stdout)
    assert json.loads(seen.stdout)["pairs"]
    assert shards_asked_for(server) == []


def test_who_may_not_write_learns_it_before_work_starts(server, workspace, tmp_path):
    arguments = convert(workspace, tmp_path / "small", "--push-to-hub", "me/small")
    refused = mha2mla(server, tmp_path / "home", *arguments, token="hf_wrong")
    assert refused.returncode == 2
    assert "hf auth login" in " ".join(refused.stderr.split())
    assert not list(tmp_path.glob("small*"))
    bad = mha2mla(
        server, tmp_path / "home", *convert(workspace, tmp_path / "small", "--push-to-hub", "a/b/c")
    )
    assert bad.returncode == 2
    assert "a/b/c" in bad.stderr


def test_a_dry_run_reads_no_shard_of_a_model_on_the_hub(server, workspace, tmp_path):
    server.made = True
    server.files |= {path.name: path.read_bytes() for path in (workspace / "model").iterdir()}
    data = ("--data", workspace / "data" / "chats.jsonl", "-o", tmp_path / "small", *SIZES)
    done = mha2mla(server, tmp_path / "home", "convert", "me/small", *data, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output_bytes"] > 0
    assert shards_asked_for(server) == []
