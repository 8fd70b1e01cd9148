"""Bad input of every kind: exit code 2, one line that names it, nothing left behind, nothing touched.

Each module of `tables` is a table of cases; a new way to go wrong is a new line in one of them.
"""

import signal

import pytest
from cases import copied, tree
from helpers import run_command
from tables import chats, configs, images, model_folders, options, published, recipes, work_folders

TABLES = (chats, configs, images, model_folders, options, published, recipes, work_folders)
CASES = {
    f"{table.__name__.rpartition('.')[2]}: {name}": case
    for table in TABLES
    for name, case in table.CASES.items()
}
LONGEST = 600  # characters of a message


@pytest.fixture
def impatient():
    """Fails a test that waits: for a pipe, or for ever in a loop."""
    earlier = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("takes more than a minute"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, earlier)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", CASES)
def test_one_line(monkeypatch, capsys, workspace, tmp_path, name):
    case = CASES[name]
    folder = copied(workspace, tmp_path / "files")
    case.change(folder)
    before = tree(folder)
    monkeypatch.chdir(folder)
    code, out, err = run_command(monkeypatch, capsys, *case.command.split(), *case.more)
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2, err
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < LONGEST
    assert case.named in err
    assert "Traceback" not in err
    assert tree(folder) == before
