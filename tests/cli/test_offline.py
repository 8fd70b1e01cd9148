"""Without a hub: what needs it is told so at once, and what is in its cache is read from there."""

import contextlib
import shutil
import socket
import threading

import hub
import pytest
from forks import SIZES

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
    "chats to report on": (*CONVERT, "--eval-data", "some/chats"),
    "a baseline": (*FINETUNE, "--baseline", "some/model"),
    "chats to train on": (*FINETUNE, "--data", "some/chats", "--baseline", "model"),
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


def test_a_hub_that_does_not_answer_is_asked_once(forks, tmp_path):
    """It takes connections and says nothing: no second is tried."""
    connections, asked = [], []

    def take():
        with contextlib.suppress(OSError):  # at the end
            while True:
                connections.append(server.accept()[0])
                asked.append(connections[-1].recv(200))

    with socket.create_server(("127.0.0.1", forks.hub_port)) as server:
        threading.Thread(target=take, daemon=True).start()
        ended = forks.run("inspect", "some/model", folder=tmp_path)
        server.shutdown(socket.SHUT_RDWR)  # or `accept` would hold the port
    assert ended.code == 2
    assert "cannot be reached (timed out)" in ended.said
    assert len([line for line in asked if line.startswith(b"HEAD ")]) == 1


def test_the_cache_is_read_without_a_hub(forks, workspace_for_forks, tmp_path):
    shutil.rmtree(forks.home, ignore_errors=True)
    ask = ("generate", "me/small", "--prompt", "Which?", "--max-new-tokens", "2")
    with hub.running(forks.hub_port) as server:
        server.made = True
        server.files |= {path.name: path.read_bytes() for path in (workspace_for_forks / "model").iterdir()}
        first = forks.run(*ask, folder=tmp_path)
        assert first.code == 0, first.said
    again = forks.run(*ask, folder=tmp_path)
    assert again.code == 0, again.said
    assert again.out == first.out
    assert "Retrying" not in again.said
