"""Without a hub: what needs it is told so at once, and what is in its cache is read from there."""

import os
import socket
import subprocess
import sys
import threading

import hub
import pytest
from forks import SIZES
from helpers import original
from test_hub import mha2mla

from mha2mla_vlm.model.checkpoint import save

CONVERT = ("convert", "model", "--data", "data", "-o", "out", *SIZES)
RANKS = ("--ranks", "ranks.pth")
FINETUNE = ("finetune", "small", "--data", "data", "-o", "out")
COMMANDS = {
    "a model to look at": ("inspect", "some/model"),
    "a model to ask": ("generate", "some/model", "--prompt", "Which?"),
    "a model to convert": ("convert", "some/model", "--data", "data", "-o", "out"),
    "chats to convert with": ("convert", "model", "--data", "some/chats", "-o", "out"),
    "an adapter": (*CONVERT, "--adapter", "some/adapter"),
    "a place to send to": (*CONVERT, "--push-to-hub", "some/small"),
    "chats to report on": (*CONVERT, "--evaluate", "some/chats"),
    "a teacher": (*FINETUNE, "--teacher", "some/model"),
    "chats to train on": (*FINETUNE, "--data", "some/chats", "--teacher", "model"),
    "an original": ("report", "small", "--data", "data", "--baseline", "some/model", "-o", "out"),
    "a processor": (
        "import-published",
        "stage2",
        "--ranks",
        "ranks.pth",
        "--processor",
        "some/m",
        "-o",
        "out",
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_what_needs_the_hub_is_told_at_once(case, forks, workspace_for_forks, tmp_path):
    if "chats" in case:
        pytest.importorskip("datasets")
    if case == "an adapter":
        pytest.importorskip("peft")
    for path in workspace_for_forks.iterdir():
        (tmp_path / path.name).symlink_to(path)
    before = set(tmp_path.iterdir())
    ended = forks.run(*COMMANDS[case], folder=tmp_path)
    assert ended.code == 2, ended.said
    assert ended.out == ""
    assert "some/" in ended.said
    assert f"{forks.hub} cannot be reached" in ended.said
    for word in ("Traceback", "Retrying", "Warning"):
        assert word not in ended.said
    assert set(tmp_path.iterdir()) == before


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path):
    """It takes connections and says nothing: no second is tried."""
    connections, asked = [], []

    def take():
        while True:
            connections.append(server.accept()[0])
            asked.append(connections[-1].recv(200))

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=take, daemon=True).start()
        home = {"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        program = [sys.executable, "-m", "mha2mla_vlm", "inspect", "some/model"]
        done = subprocess.run(program, env=os.environ | home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "cannot be reached (timed out)" in " ".join(done.stderr.split())
    assert len([line for line in asked if line.startswith(b"HEAD ")]) == 1


def test_the_cache_is_read_without_a_hub(tmp_path):
    save(*original("llava"), tmp_path / "model")
    server = hub.start()
    server.made = True
    server.files |= {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    ask = ("generate", "me/small", "--prompt", "Which?", "--max-new-tokens", "2")
    first = mha2mla(server, tmp_path / "home", *ask)
    assert first.returncode == 0, first.stderr
    server.shutdown()
    server.server_close()
    again = mha2mla(server, tmp_path / "home", *ask)
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    assert "Retrying" not in again.stderr
