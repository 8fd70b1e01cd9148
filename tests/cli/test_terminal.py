"""What people see on a terminal, and what scripts read elsewhere."""

import json
import os
import re
import subprocess
import sys
import threading

import pytest
from helpers import original, random_mla, run_command

from mha2mla_vlm.cli.main import main
from mha2mla_vlm.cli.results import facts
from mha2mla_vlm.model.checkpoint import save
from mha2mla_vlm.utils.progress import console, status, track
from mha2mla_vlm.zoo.chats import write_chats

COMMANDS = (  # in the order of work
    "demo", "zoo", "convert", "import-published", "evaluate", "inspect", "report", "bench", "task",
    "finetune", "recipes", "generate", "chat",
)  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A random original, a model converted from it, and chats."""
    folder = tmp_path_factory.mktemp("workspace")
    save(*original("llava"), folder / "model")
    save(*random_mla("llava", rank=32), folder / "small")
    (folder / "data").mkdir()
    write_chats("llava", folder / "data", split="test", samples=2, seed=0)
    return folder


class Screen:
    """A terminal as standard output and error, and what is written to it, less what moves the cursor."""

    def __init__(self, monkeypatch):
        console.cache_clear()  # which looks at the terminal once
        self.ours, theirs = os.openpty()
        self.file = open(theirs, "w")  # noqa: SIM115 (closed by `text`)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, self.file)
        self.found = bytearray()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        try:
            while piece := os.read(self.ours, 65536):
                self.found += piece
        except OSError:  # the other end is closed
            pass

    def text(self):
        console.cache_clear()
        self.file.close()
        self.reader.join()
        os.close(self.ours)
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.found.decode())


@pytest.fixture
def on_screen(monkeypatch):
    """`on_screen(*arguments)` runs a command on a terminal: its exit code and what is seen."""

    def run(*arguments):
        with monkeypatch.context() as during:
            screen = Screen(during)
            during.setattr(sys, "argv", ["mha2mla", *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                main()
        return ended.value.code, screen.text()

    return run


def test_a_table_on_a_terminal_and_json_elsewhere(monkeypatch, capsys, on_screen, workspace):
    command = ["evaluate", workspace / "small", "--data", workspace / "data"]
    _, out, err = run_command(monkeypatch, capsys, *command)
    values = json.loads(out)
    assert err == ""
    code, seen = on_screen(*command)
    assert code == 0
    assert "{" not in seen
    assert re.search(f"^exact match +{values['exact_match']:.1%}", seen, re.MULTILINE)
    assert re.search(f"^cross entropy +{values['cross_entropy']:.4g}", seen, re.MULTILINE)
    assert all(words in seen for words in ("loading the weights of", "generating answers", "measuring loss"))
    code, seen = on_screen(*command, "--json")
    assert code == 0
    assert json.loads(seen.splitlines()[-1]) == values


def test_a_command_with_a_table_of_its_own(monkeypatch, capsys, on_screen, workspace):
    _, out, err = run_command(monkeypatch, capsys, "inspect", workspace / "small")
    assert json.loads(out)["layers"] == 4
    assert "predicted KL" in err
    code, out, err = run_command(monkeypatch, capsys, "inspect", workspace / "small", "--json")
    assert (code, err) == (0, "")
    code, seen = on_screen("inspect", workspace / "small")
    assert code == 0
    assert "predicted KL" in seen
    assert "{" not in seen


def test_bars_take_the_place_of_a_spinner(monkeypatch):
    screen = Screen(monkeypatch)
    with status("outside"):
        assert list(track(range(2), "inside")) == [0, 1]
        with status("further in"), status("innermost"):
            console().print("a message")
    seen = screen.text()
    assert re.search(r"outside.*inside.*outside.*further in.*innermost.*further in.*outside", seen, re.DOTALL)
    assert re.search(r"^\s*a message\s*$", seen, re.MULTILINE)


def test_numbers_for_people():
    values = {
        "exact_match": 0.91666,
        "kl": 0.00123456,
        "cache_bytes": 2048,
        "peak_bytes": 2_345_678_901,
        "seconds": {"partial_rope": 12.345},
        "kv_lora_rank": [64, 64, 64],
        "predicted_kl": None,
        "by_kind": {"read": {"answers": 1200, "exact_match": 0.5}},
    }
    cells = [tuple(column.cells) for column in facts(values).columns]
    assert dict(zip(*cells, strict=True)) == {
        "exact match": "91.7%",
        "kl": "0.001235",
        "cache bytes": "2,048 bytes",
        "peak bytes": "2.3 GB",
        "seconds": "",
        "  partial rope": "12.3 s",
        "kv lora rank": "64 in each of 3",
        "predicted kl": "-",
        "by kind": "",
        "  read": "",
        "    answers": "1,200",
        "    exact match": "50.0%",
    }


def test_help_lists_commands_in_the_order_of_work(monkeypatch, capsys):
    code, out, _ = run_command(monkeypatch, capsys, "--help")
    assert code == 0
    assert re.findall(r"^│ ([a-z][a-z-]+) ", out, re.MULTILINE) == [*COMMANDS]
    code, _, _ = run_command(monkeypatch, capsys)
    assert code == 2


@pytest.mark.parametrize("command", ["convert", "finetune"])
def test_help_of_a_command_cuts_no_name(monkeypatch, capsys, command):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run_command(monkeypatch, capsys, command, "--help")
    assert code == 0
    assert "…" not in out
    assert "--json" in out
    assert ("--qk-rope-head-dim" if command == "convert" else "--gradient-checkpointing") in out


def test_version(monkeypatch, capsys):
    from mha2mla_vlm import __version__

    assert run_command(monkeypatch, capsys, "--version") == (0, f"mha2mla {__version__}\n", "")


def test_help_loads_neither_torch_nor_transformers():
    code = (
        "import sys; from mha2mla_vlm.cli.main import main; sys.argv[1:] = ['convert', '--help']\n"
        "try: main()\n"
        "except SystemExit: print({'torch', 'transformers'} & sys.modules.keys(), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stderr.strip() == "set()"


COMPLETIONS = {
    "mha2mla con": ["convert"],
    "mha2mla convert z": ["zoo:qwen2_5_vl", "zoo:llava_next", "zoo:llava", "zoo:qwen3_vl"],
    "mha2mla convert zoo:llava_": ["zoo:llava_next"],
    "mha2mla convert m --factorization only": ["only-key", "only-value"],
    "mha2mla convert m --rope-selection mk": ["mkl"],
    "mha2mla convert m --rotate-at ": ["write", "read", "auto"],
    "mha2mla finetune m --config zoo/": ["zoo/single_stage", "zoo/stage1", "zoo/stage2"],
    "mha2mla finetune m --trains v": ["v2", "v3", "v4", "v5", "v6"],
    "mha2mla recipes accelerate/z": ["accelerate/zero1", "accelerate/zero2"],
    "mha2mla zoo data ll": ["llava_next", "llava"],
    "mha2mla inspect sm": [],  # the shell looks for a folder
}


@pytest.mark.parametrize("typed", COMPLETIONS)
def test_completions(monkeypatch, capsys, typed):
    monkeypatch.setenv("_MHA2MLA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(typed.count(" ")))
    _, out, _ = run_command(monkeypatch, capsys)
    assert out.split() == COMPLETIONS[typed]


def test_recipes_by_name_and_path(monkeypatch, capsys, on_screen):
    _, out, _ = run_command(monkeypatch, capsys, "recipes")
    listed = {item["name"]: item["path"] for items in json.loads(out).values() for item in items}
    assert {"zoo/stage1", "accelerate/ddp"} <= listed.keys()
    code, out, _ = run_command(monkeypatch, capsys, "recipes", "accelerate/ddp")
    assert (code, out) == (0, listed["accelerate/ddp"] + "\n")
    code, seen = on_screen("recipes")
    assert code == 0
    assert re.search(r"zoo/single_stage +finetune --config", seen)
