"""Places of results: free, written to by one run at a time, and with all of a result or nothing of it."""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from mha2mla_vlm.errors import InputError, first_line, shown_path

logger = logging.getLogger(__name__)

LOCKED = "mha2mla\n"  # what a lock file of ours holds
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
DENIED = (errno.EIO, errno.EACCES)  # which reading gives, too
TORCH_WRITES = ("PytorchStreamWriter", "inline_container")  # what torch.save says if it cannot
_claims: set[Path] = set()  # of this process: a claim within a claim is the same one


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


def check_file(output: str | Path) -> Path:
    """Raise `InputError` if a file cannot be written there: its folder must exist. Returns it resolved."""
    path = _resolved(output)
    if not path.parent.is_dir():
        parent = Path(output).parent
        raise InputError(f"output {output}: {parent} is no folder; give a file in one that is there")
    if path.exists() and not path.is_file():
        raise InputError(f"output {output} is there and no file; give the name of a file")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"output {output} cannot be made: {path.parent} cannot be written to")
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


@contextlib.contextmanager
def claimed(output: str | Path, check: Callable[[str | Path], Path] = check_output) -> Iterator[Path]:
    """Within the context no other process writes to `output`, which is yielded resolved.

    A file beside it is locked, and removed at the end. A process that is killed leaves the file, but not the
    lock. Raises `InputError` if another run holds it, or if `check` refuses `output`.
    """
    path = check(output)
    if path in _claims:
        yield path
        return
    with _parents(path), contextlib.ExitStack() as stack:
        lock = path.with_name(f".{path.name}.lock")
        with writing(path.parent):
            file = stack.enter_context(_locked(lock, path))
            left = _is_ours(file, lock)
            stack.callback(lock.unlink, missing_ok=True)
            check(output)  # another run may have ended just now
            _make_room(temporary_of(path), left)
            if not left:
                file.write(LOCKED)
                file.flush()
        stack.callback(_make_room, temporary_of(path), True)  # if it was interrupted as it removed that
        _claims.add(path)
        stack.callback(_claims.discard, path)
        yield path


@contextlib.contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Make the folders above, and remove those that are empty at the end."""
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # one that is not empty ends it
            for parent in made:
                parent.rmdir()


def _locked(lock: Path, path: Path) -> IO[str]:
    """The lock file, open and locked. POSIX locks are not inherited by processes that are forked."""
    while True:
        file = lock.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise InputError(f"another run is writing to {path}; wait for it, or choose another") from None
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s cannot be locked (%s): start no second run", path, error.strerror)
            return file
        if lock.exists() and lock.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return file
        file.close()  # that run ended and removed it in between


def _is_ours(file: IO[str], lock: Path) -> bool:
    """Whether a run that was killed left the lock file; raises `InputError` if it is something else."""
    file.seek(0)
    try:
        content = file.read(len(LOCKED) + 1)
    except UnicodeDecodeError:
        content = "something else"
    if content not in ("", LOCKED):
        raise InputError(f"{lock} is there and is no lock of this program; move it, or choose another output")
    return content == LOCKED


def temporary_of(path: Path) -> Path:
    """Where a result is made before it is put in its place; it is ours if our lock file is there, too."""
    return path.with_name(f".{path.name}.tmp")


def _make_room(temporary: Path, ours: bool) -> None:
    """Remove what a run that was killed left."""
    if not temporary.exists():
        return
    if not ours:
        raise InputError(f"{temporary} is there and not of this program; move it, or choose another output")
    if temporary.is_dir():
        shutil.rmtree(temporary)
    else:
        temporary.unlink()


def discard(folder: Path, output: Path) -> None:
    """Remove a folder of a run to `output`, which is claimed: it is whole or gone, whenever the run ends."""
    temporary = temporary_of(output)
    folder.rename(temporary)
    shutil.rmtree(temporary)


@contextlib.contextmanager
def writing(folder: Path, what: str = "", kept: str = "") -> Iterator[None]:
    """Say in one line what could not be written to `folder`, because it is full for one, and what is kept."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if (reason := _failure(error, folder)) is None:
            raise
        raise InputError(f"{what}cannot write in {folder}: {reason}{kept}") from error


def _failure(error: Exception, folder: Path) -> str | None:
    """Why something could not be written; None for another error."""
    if isinstance(error, OSError):
        inside = error.filename is None or folder in Path(str(error.filename)).parents
        is_written = error.errno in FULL or (error.errno in DENIED and inside)
        return os.strerror(error.errno) if is_written and error.errno else None
    text = first_line(error)
    if any(word in text for word in TORCH_WRITES):
        return f"no space is left, or a write failed ({text})"
    return text if "while serializing" in text else None


def put_in_place(folder: Path, output: Path) -> None:
    """Give a finished folder its name, at which there is nothing or an empty folder, and the modes that new
    files and folders get here: safetensors lets nobody else read what it writes.
    """
    probe = folder / ".mode"
    probe.unlink(missing_ok=True)
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in (folder, *folder.rglob("*")):
        path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)
    folder.rename(output)


@contextlib.contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `output` at the end, and is gone if anything fails."""
    with claimed(output) as path:
        temporary = temporary_of(path)
        try:
            with writing(path.parent):
                temporary.mkdir()
                yield temporary
                put_in_place(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextlib.contextmanager
def new_file(output: str | Path) -> Iterator[Path]:
    """A temporary name for a file that is put in its place at the end, and is gone if anything fails."""
    with claimed(output, check_file) as path:
        temporary = temporary_of(path)
        try:
            with writing(path.parent):
                yield temporary
                temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
