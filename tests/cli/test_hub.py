"""Models on their way to the hub and read from there, against one on loopback."""

import json
import os
import re
import shutil
import termios
import threading

import hub
import pytest
from forks import SIZES
from huggingface_hub import ModelCard


@pytest.fixture
def server(forks):
    """A hub that runs while a test does."""
    with hub.running(forks.hub_port) as server:
        yield server


@pytest.fixture
def mha2mla(forks, tmp_path):
    """The command in a fork whose hub is the server's, with nothing of it in the cache."""

    def run(*arguments, token="hf_test", err=None, **environment):
        shutil.rmtree(forks.home, ignore_errors=True)
        known = {"HF_TOKEN": token, **environment}
        return forks.run(*arguments, folder=tmp_path, environment=known, err=err)

    return run


def convert(workspace, *more):
    return ("convert", workspace / "model", "--data", workspace / "data", "-o", "small", *SIZES, *more)


def shards_asked_for(server):
    """Shards that were read as a whole."""
    return [
        path
        for how, path, part in server.asked
        if how == "GET" and path.endswith(".safetensors") and not part
    ]


def test_a_converted_model_is_sent_and_read_from_there(server, workspace_for_forks, mha2mla, tmp_path):
    sent = mha2mla(*convert(workspace_for_forks, "--push-to-hub", "me/small"))
    assert sent.code == 0, sent.said
    assert json.loads(sent.out)["pushed"].endswith("/me/small")
    written = {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()}
    assert {name: server.files.get(name) for name in written} == written

    card = ModelCard(written["README.md"].decode())
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "mha2mla-vlm" in card.data.tags
    assert "(18.8%)" in card.text
    assert "Built with Llama" in card.text

    server.asked.clear()
    seen = mha2mla("inspect", "me/small")
    assert seen.code == 0, seen.said
    local = mha2mla("inspect", tmp_path / "small")
    assert json.loads(seen.out) == json.loads(local.out)
    assert json.loads(seen.out)["pairs"]
    assert shards_asked_for(server) == []


def test_who_may_not_write_learns_it_before_work_starts(server, workspace_for_forks, mha2mla, tmp_path):
    refused = mha2mla(*convert(workspace_for_forks, "--push-to-hub", "me/small"), token="hf_wrong")
    assert refused.code == 2
    assert "hf auth login" in refused.said
    assert not list(tmp_path.glob("small*"))
    bad = mha2mla(*convert(workspace_for_forks, "--push-to-hub", "a/b/c"))
    assert bad.code == 2
    assert "a/b/c" in bad.said


def test_a_dry_run_reads_no_shard_of_a_model_on_the_hub(server, workspace_for_forks, mha2mla):
    server.made = True
    server.files |= {path.name: path.read_bytes() for path in (workspace_for_forks / "model").iterdir()}
    data = ("--data", workspace_for_forks / "data", "-o", "small", *SIZES)
    done = mha2mla("convert", "me/small", *data, "--dry-run")
    assert done.code == 0, done.said
    assert json.loads(done.out)["output_bytes"] > 0
    assert shards_asked_for(server) == []


@pytest.fixture
def terminal():
    """The path of a terminal, and a function that closes it and returns what was seen there."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    found = bytearray()

    def read():
        try:
            while piece := os.read(ours, 65536):
                found.extend(piece)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()

    def seen():
        os.close(theirs)
        reader.join()
        os.close(ours)
        return found.decode()

    return os.ttyname(theirs), seen


@pytest.mark.parametrize("command", ["generate", "convert"])  # which load a model, and read it from a folder
def test_a_download_is_seen(command, server, workspace_for_forks, mha2mla, terminal, tmp_path):
    server.made = True
    server.files |= {path.name: path.read_bytes() for path in (workspace_for_forks / "model").iterdir()}
    given = {
        "generate": ("generate", "me/small", "--prompt", "Which?", "--max-new-tokens", 1),
        "convert": ("convert", "me/small", "--data", workspace_for_forks / "data", "-o", "out", *SIZES),
    }[command]
    piped = mha2mla(*given)
    assert piped.code == 0, piped.said
    assert re.search(r"downloading me/small: \d+\.\d MB", piped.said)
    assert "%|" not in piped.said  # no bars in a log
    path, seen = terminal
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    ended = mha2mla(*given, err=path, TERM="xterm", COLUMNS="100")
    text = seen()
    assert ended.code == 0, text
    shown = [float(number) for number in re.findall(r"(\d+)%\|", text.split("downloading me/small")[1])]
    assert shown[-1] == 100, text
    assert len(shards_asked_for(server)) == 2  # once for each run: nothing was downloaded twice
