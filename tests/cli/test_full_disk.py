"""Disks that are full and places that cannot be written to: one line, and nothing half-written."""

import shutil

import pytest
from forks import COMMANDS, contents

# bytes that a file may have: enough to begin, not to end
LARGEST = {
    "convert": 1_000_000,
    "finetune": 1_000_000,
    "report": 20_000,
    "zoo data": 500,
    "zoo build": 1_000_000,
    "bench": 5000,
    "task": 500,
    "import-published": 100_000,
}
RESUMABLE = ("convert", "finetune", "zoo build")
PAGES = {"report"}  # whose output is a file


def check_refused(ended, output):
    """One line with what failed, and nothing at the output or beside it but what a run may resume from."""
    assert ended.code == 2, ended.said
    assert ended.out == ""
    assert "error: " in ended.said
    assert "Traceback" not in ended.said
    left = {path.name for path in output.parent.iterdir()}
    assert left <= {"out.partial"}, left
    return left


def check_full(name, ended, output):
    left = check_refused(ended, output)
    assert "cannot write in" in ended.said
    assert ("what is done is kept" in ended.said) == bool(left) == (name in RESUMABLE)


@pytest.mark.parametrize("name", [*LARGEST, pytest.param("demo", marks=pytest.mark.slow)])
def test_a_full_disk(name, forks, workspace_for_forks, tmp_path):
    command, output = COMMANDS[name], tmp_path / "out"
    ended = forks.run(*command, output, folder=workspace_for_forks, largest=LARGEST.get(name, 5000))
    check_full(name, ended, output)
    assert "File too large" in ended.said or name in ("finetune", "zoo build")  # torch.save does not tell


@pytest.mark.parametrize("name", ["convert", "finetune"])
def test_with_room_it_goes_on_to_the_same_bytes(name, forks, workspace_for_forks, tmp_path):
    for place, largest in (("whole", None), ("broken", 3_000_000)):
        (tmp_path / place).mkdir()
        command = (*COMMANDS[name], tmp_path / place / "out")
        ended = forks.run(*command, folder=workspace_for_forks, largest=largest)
        assert ended.code == (0 if largest is None else 2), ended.said
    resume = ("--resume",) if name == "convert" else ()
    ended = forks.run(*command, *resume, folder=workspace_for_forks)
    assert ended.code == 0, ended.said
    assert [path.name for path in (tmp_path / "broken").iterdir()] == ["out"]
    found, expected = (contents(tmp_path / place / "out") for place in ("broken", "whole"))
    assert found.keys() == expected.keys()
    timed = {"finetune.json", "training_log.jsonl"}  # with seconds in them
    assert [path for path in found if path not in timed and found[path] != expected[path]] == []


@pytest.fixture
def disk(forks):
    """An empty disk, as the forks see it and as we do."""
    if forks.disk is None:
        pytest.skip("this system lets nobody mount")
    empty(forks.disk_seen)
    return forks.disk, forks.disk_seen


def empty(folder):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def fill(folder, kilobytes):
    """Leave so much room on a disk."""
    (folder / "filler").write_bytes(b"\0" * (shutil.disk_usage(folder).free - 1024 * kilobytes))


# kilobytes that are free
ROOM = {"convert": 4000, "finetune": 20_000, "report": 40, "zoo data": 8, "task": 8, "import-published": 100}


@pytest.mark.parametrize("name", ROOM)
def test_a_disk_without_room(name, forks, disk, workspace_for_forks):
    folder, seen = disk
    fill(seen, ROOM[name])
    (seen / "place").mkdir()
    command = (*COMMANDS[name], folder / "place" / "out")
    ended = forks.run(*command, folder=workspace_for_forks)
    check_full(name, ended, seen / "place" / "out")
    assert "No space left on device" in ended.said or "no space is left" in ended.said
    (seen / "filler").unlink()
    resume = ("--resume",) if name == "convert" else ()
    ended = forks.run(*command, *resume, folder=workspace_for_forks)
    assert ended.code == 0, ended.said
    assert [path.name for path in (seen / "place").iterdir()] == ["out"]


def test_a_report_that_has_no_room_leaves_the_conversion(forks, disk, workspace_for_forks):
    folder, seen = disk
    command = (*COMMANDS["convert"], folder / "out", "--eval-data", "data")
    moment = {"after": ".report.html.lock", "below": "", "event": 1, "signal": "SIGSTOP"}
    stopped = forks.run(*command, folder=workspace_for_forks, **moment)
    assert stopped.stopped, stopped.said
    before = contents(seen / "out")
    fill(seen, 8)
    ended = forks.go_on(stopped)
    assert ended.code == 2
    assert f"the model is in {folder / 'out'}, without its report: cannot write in" in ended.said
    assert f"try: mha2mla report {folder / 'out'}" in ended.said
    assert contents(seen / "out") == {path: data for path, data in before.items() if ".lock" not in path}


@pytest.mark.parametrize("name", COMMANDS)
def test_places_that_cannot_be_written_to(name, forks, workspace_for_forks, tmp_path):
    """Below a file; and a folder for a file, or a file for a folder."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    before = contents(tmp_path)
    for place in ("file/out", "folder", *(() if name in PAGES else ("file",))):
        ended = forks.run(*COMMANDS[name], tmp_path / place, folder=workspace_for_forks)
        assert ended.code == 2, ended.said
        assert f"error: output {tmp_path / place}" in ended.said
        assert ended.said.count("error") == 1
        assert contents(tmp_path) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_is_read_only(name, forks, workspace_for_forks, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder").chmod(0o555)
    for place in ("folder/out", "folder/below/out"):
        ended = forks.run(*COMMANDS[name], tmp_path / place, folder=workspace_for_forks, plain=True)
        assert ended.code == 2, ended.said
        assert f"error: output {tmp_path / place}" in ended.said
        assert "Traceback" not in ended.said
        assert not list((tmp_path / "folder").iterdir())


def test_a_full_standard_output(forks, workspace_for_forks):
    ended = forks.run("zoo", "list", folder=workspace_for_forks, out="/dev/full")
    assert ended.code == 2
    assert ended.said.endswith("error: standard output cannot be written to: No space left on device")
