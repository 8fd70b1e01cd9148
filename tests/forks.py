"""Commands that end, stop or fail at a chosen moment, in forks of one process (`processes/forkserver.py`)."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from helpers import free_port, original, random_mla

from mha2mla_vlm.model.checkpoint import save
from mha2mla_vlm.zoo.chats import write_chats

SERVER = Path(__file__).parent / "processes" / "forkserver.py"
PUBLISHED = Path(__file__).parent / "fixtures" / "published" / "llava"
SIZES = ("--qk-rope-head-dim", 16, "--d-kv", 8)
SMALL = ("--no-bf16", "--batch-size", 1, "--gradient-accumulation", 1, "--eval-samples", 2, "--save-every", 1)
COMMANDS = {  # each writes `out`, in the working folder or a `place` in it, from what `make_workspace` makes
    "convert": ("convert", "model", "--data", "data", *SIZES, "-o"),
    "finetune": ("finetune", "small", "--data", "data", "--baseline", "model", *SMALL, "-o"),
    "report": (
        "report",
        "small",
        "--data",
        "data",
        "--baseline",
        "model",
        "--samples",
        1,
        "--layer-samples",
        1,
        "-o",
    ),
    "zoo data": ("zoo", "data", "llava", "--samples", 3, "-o"),
    "zoo build": ("zoo", "build", "llava", "--minutes", 0.01, "-o"),
    "demo": ("demo", "--model", "llava", "--samples", 1, "-o"),
    "bench": (
        "bench",
        "small",
        "--baseline",
        "model",
        "--context",
        8,
        "--batch-size",
        1,
        "--seconds",
        0,
        "-o",
    ),
    "task": ("task", "data", "--name", "asked", "-o"),
    "import-published": ("import-published", "stage2", "--ranks", "ranks.pth", "-o"),
}


def make_workspace(folder):
    """What `COMMANDS` read: a random original, a model of the sizes it would be converted to, and chats."""
    save(*original("llava"), folder / "model")
    save(*random_mla("llava", rank=32), folder / "small")
    shutil.copytree(PUBLISHED / "stage2", folder / "stage2")
    shutil.copy(PUBLISHED / "ranks.pth", folder)
    (folder / "data").mkdir()
    write_chats("llava", folder / "data", split="train", samples=5, seed=0)
    return folder


def contents(folder):
    """Every file below a folder, by its path, with what it holds; without tensorboard's, named by time and
    machine.
    """
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith("events.out"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@dataclass
class Ended:
    """What came of a command; `events` is how many events of files there were, if it was not killed."""

    code: int | None
    stopped: int | None
    files: dict

    def _read(self, name):
        path = Path(self.files[name])
        return path.read_text(errors="replace") if path.is_file() else ""

    @property
    def out(self):
        return self._read("out")

    @property
    def said(self):
        """What it said on standard error, in one line."""
        return " ".join(self._read("err").split())

    @property
    def events(self):
        return int(self._read("count"))


class Forks:
    """A server of forks, as a context, that also imports some `modules` before.

    The folder `disk` is a small file system for it, which we see at `disk_seen`; it is None where the
    system lets nobody mount.
    """

    def __init__(self, scratch, *modules):
        self.names = (str(scratch / f"{number}") for number in itertools.count())
        self.stopped = set()
        self.disk = scratch / "disk"
        self.disk.mkdir()
        mounted = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else []), "sh", "-c"]
        mounted += [f'mount -t tmpfs -o size=256m none {self.disk} && exec "$@"', "sh"]
        if shutil.which("unshare") is None or subprocess.run([*mounted, "true"]).returncode:
            self.disk, mounted = None, []
        self.hub_port, self.home = free_port(), scratch / "home"
        self.hub = f"http://127.0.0.1:{self.hub_port}"  # there is none, unless a test starts one
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_ENDPOINT": self.hub,
            "HF_HOME": str(self.home),
        }
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        program = [*mounted, sys.executable, str(SERVER), *modules]
        self.process = subprocess.Popen(program, env=environment, **pipes)

    @property
    def disk_seen(self):
        return Path(f"/proc/{self.process.pid}/root{self.disk}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in list(self.stopped):
            self._ask({"stopped": process, "signal": "SIGKILL"}, {})
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, request, files):
        print(json.dumps(request | files), file=self.process.stdin, flush=True)
        reply = json.loads(self.process.stdout.readline())
        self.stopped.discard(request.get("stopped"))
        if "stopped" in reply:
            self.stopped.add(reply["stopped"])
        return Ended(reply.get("code"), reply.get("stopped"), files)

    def run(self, *arguments, folder, signal="SIGKILL", out=None, err=None, **when):
        """Run a command in a folder, to its end or to a signal.

        The signal comes at the n-th `event` of a file whose path has `below` in it, or that is `renamed` to a
        name that ends so, `after` one of a file whose name ends so; or after some `seconds`. No file can grow
        beyond `largest` bytes; as a `plain` user, root may write no more than another. With `script`, that
        runs with the arguments. Several `processes` are told of each other as `torch.distributed.run` does.
        Standard output and error go to files of their own, or to the paths `out` and `err`.
        """
        request = {"arguments": list(map(str, arguments)), "folder": str(folder), "signal": signal}
        request |= dict.fromkeys(("event", "seconds", "largest", "after", "plain", "renamed", "processes"))
        request |= {"below": str(folder), "script": None, "environment": {}, "port": free_port()} | when
        files = {name: next(self.names) for name in ("out", "err", "count")}
        given = {name: path for name, path in (("out", out), ("err", err)) if path is not None}
        return self._ask(request, files | given)

    def go_on(self, ended, signal="SIGCONT"):
        """Go on with a command that was stopped by SIGSTOP, or end it by another signal."""
        return self._ask({"stopped": ended.stopped, "signal": signal}, ended.files)
