"""What a case of bad input is: a command, a change to good files before it, and what the line must name."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SIZES = "--qk-rope-head-dim 16 --d-kv 8"
CONVERT = f"convert model --data data -o out {SIZES}"
EVALUATE = "evaluate small --data data"
FINETUNE = "finetune small --data data -o out --baseline model"
GENERATE = "generate small --prompt Read. --max-new-tokens 1"


@dataclass(frozen=True, kw_only=True)
class Case:
    """`command` runs in a folder of `model`, `small`, `data` and `published`, changed by `change`."""

    command: str
    named: str
    change: Callable[[Path], object] = lambda folder: None
    more: tuple[str, ...] = ()  # arguments with spaces


def text(place, content):
    """A change: a file of that text, or of those bytes."""

    def change(folder):
        path = folder / place
        path.unlink(missing_ok=True)  # it may be a link to the good one
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def removed(place):
    """A change: that file is gone."""
    return lambda folder: (folder / place).unlink()


def edited(place, **values):
    """A change: keys of a JSON file; `a__b` is `b` in `a`, and `...` takes a key away."""

    def change(folder):
        content = json.loads((folder / place).read_text())
        for name, value in values.items():
            *outer, key = name.split("__")
            inside = content
            for step in outer:
                inside = inside[step]
            if value is ...:
                inside.pop(key, None)
            else:
                inside[key] = value
        text(place, json.dumps(content))(folder)

    return change


def both(*changes):
    """Changes, one after the other."""
    return lambda folder: [change(folder) for change in changes]


def cut(place, size):
    """A change: a file without its end, or, of a negative size, without its last bytes."""
    return lambda folder: text(place, (folder / place).read_bytes()[:size])(folder)


def pipe(place):
    """A change: a pipe that nobody writes to, which would be waited for."""

    def change(folder):
        (folder / place).unlink(missing_ok=True)
        os.mkfifo(folder / place)

    return change


def copied(workspace, folder):
    """The good files, as links: a change puts another file in a place."""
    shutil.copytree(workspace, folder, copy_function=os.link)
    return folder


def tree(folder):
    """All files and folders below, with what would tell a change."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns * path.is_file())
        for path in sorted(folder.rglob("*"))
    }
