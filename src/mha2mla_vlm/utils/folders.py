"""Folders of results: a place that is free, and a write that is whole or not there."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mha2mla_vlm.errors import InputError, shown_path


def check_output(output: str | Path) -> Path:
    """Raise `InputError` if a result cannot go to `output`: it must be a new or an empty folder.

    Returns it resolved. The working folder itself cannot be replaced.
    """
    if not str(output) or "\0" in str(output):
        raise InputError(f"output {shown_path(output)}: give the name of a folder")
    path = _resolved(output)
    if path == Path.cwd() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise InputError(f"output {output} exists and is not an empty folder; choose another or remove it")
    existing = next(parent for parent in path.parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"output {output} cannot be made: {existing} is not a folder that can be written to")
    return path


def _resolved(output: str | Path) -> Path:
    try:
        path = Path(output).resolve()
        path.exists()  # a name that is too long fails here
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # also loops of links, before Python 3.13; zero bytes
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"output {shown_path(output)} cannot be made: {reason}") from None
    return path


def put_in_place(folder: Path, output: Path) -> None:
    """Give a finished folder its name, at which there is nothing or an empty folder, and the modes that new
    files and folders get here: safetensors lets nobody else read what it writes.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        probe = Path(made, "probe")
        probe.touch()
        mode = probe.stat().st_mode & 0o777
    for path in (folder, *folder.rglob("*")):
        path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)
    if output.exists():
        output.rmdir()
    folder.rename(output)


@contextlib.contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `output` at the end, and is gone if anything fails."""
    path = check_output(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        put_in_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
