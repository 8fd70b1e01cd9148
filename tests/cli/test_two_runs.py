"""Two runs to one output: the second is told at once and touches nothing, however the first ends."""

import pytest
from forks import COMMANDS, contents

from mha2mla_vlm import InputError
from mha2mla_vlm.utils.folders import check_file, claimed, new_file, new_folder

STOPPED = {"after": ".lock", "below": "", "event": 1, "signal": "SIGSTOP"}  # once it holds its lock


def refused(ended, *words):
    """One clear line and no result."""
    assert ended.code == 2, ended.said
    assert ended.out == ""
    assert "Traceback" not in ended.said
    for word in words:
        assert word in ended.said


@pytest.mark.parametrize("name", COMMANDS)
def test_the_second_is_refused_and_a_kill_ends_the_lock(name, forks, workspace_for_forks, tmp_path):
    command, output = COMMANDS[name], tmp_path / "out"
    first = forks.run(*command, output, folder=workspace_for_forks, **STOPPED)
    assert first.stopped, first.said
    before = contents(tmp_path)
    for second in (command, COMMANDS["task"]):
        refused(
            forks.run(*second, output, folder=workspace_for_forks), "another run is writing to", str(output)
        )
    assert contents(tmp_path) == before
    assert forks.go_on(first, "SIGKILL").code == -9
    other = forks.run(*COMMANDS["task"], output, folder=workspace_for_forks)
    assert other.code == 0, other.said
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith((".lock", ".tmp"))]


@pytest.mark.parametrize("name", ["convert", "finetune"])
def test_the_first_ends_as_if_it_were_alone(name, forks, workspace_for_forks, tmp_path):
    command = (*COMMANDS[name], tmp_path / "out")
    moment = {"after": "out.partial", "below": "out.partial", "event": 12, "signal": "SIGSTOP"}
    first = forks.run(*command, folder=workspace_for_forks, **moment)
    assert first.stopped, first.said
    before = contents(tmp_path)
    for more in ((), ("--resume",) if name == "convert" else ()):
        refused(forks.run(*command, *more, folder=workspace_for_forks), "another run is writing to")
    assert contents(tmp_path) == before
    first = forks.go_on(first)
    assert first.code == 0, first.said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not [path for path in contents(tmp_path) if ".lock" in path or ".tmp" in path]


def test_one_that_ends_meanwhile_is_seen(forks, workspace_for_forks, tmp_path):
    """The first is stopped before it takes the lock, the second runs to its end."""
    command = (*COMMANDS["task"], tmp_path / "out")
    moment = {"below": ".out.lock", "event": 1, "signal": "SIGSTOP"}
    first = forks.run(*command, folder=workspace_for_forks, **moment)
    assert first.stopped
    assert forks.run(*command, folder=workspace_for_forks).code == 0
    before = contents(tmp_path)
    refused(forks.go_on(first), "exists and is not an empty folder")
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


TOGETHER = """
import sys
import torch.distributed as dist
from mha2mla_vlm import InputError
from mha2mla_vlm.utils.distributed import claimed_by_first, shared_work, wait_for_all
dist.init_process_group("gloo")
with shared_work():
    with claimed_by_first(sys.argv[1]):
        wait_for_all()
    try:
        with claimed_by_first(sys.argv[2]):
            print("claimed", flush=True)
    except InputError as error:
        print(error, flush=True)
dist.destroy_process_group()
"""


def test_one_of_several_processes_holds_the_lock(forks, tmp_path):
    """And all of them are refused, so that none waits for the first."""
    script = tmp_path / "script.py"
    script.write_text(TOGETHER)
    with claimed(tmp_path / "taken"):
        given = (tmp_path / "free", tmp_path / "taken")
        ended = forks.run(*given, script=str(script), processes=2, folder=tmp_path)
    assert ended.code == 0, ended.said
    assert ended.out.count("another run is writing to") == 2
    assert "claimed" not in ended.out
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_a_claim_within_a_claim_is_the_same(tmp_path):
    with claimed(tmp_path / "out") as path, new_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("a")
        assert path == tmp_path / "out"
    assert contents(tmp_path) == {"out/a.txt": b"a"}


def test_folders_above_are_made_and_gone_if_nothing_is_written(tmp_path):
    def spoiled():
        with new_folder(tmp_path / "a" / "b" / "out") as folder:
            assert folder.parent == tmp_path / "a" / "b"
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        spoiled()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [".out.lock", ".out.tmp"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_not_ours_is_left_alone(name, kind, tmp_path):
    (tmp_path / name).write_text("mine")
    (tmp_path / "out").write_text("old") if kind == "file" else None
    with (
        pytest.raises(InputError, match="is there and"),
        new_file(tmp_path / "out") if kind == "file" else new_folder(tmp_path / "out"),
    ):
        pass
    assert (tmp_path / name).read_text() == "mine"


def test_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path / ".out.lock").write_text("mha2mla\n")
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "half.txt").write_text("half")
    with claimed(tmp_path / "out"):
        assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole(tmp_path):
    (tmp_path / "page.html").write_text("old")
    with new_file(tmp_path / "page.html") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "page.html").read_text() == "old"
    assert contents(tmp_path) == {"page.html": b"new"}
    for place in (tmp_path, tmp_path / "page.html" / "below", tmp_path / "absent" / "page.html"):
        with pytest.raises(InputError, match="give"):
            check_file(place)
