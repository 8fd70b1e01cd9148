"""Where a conversion layer by layer keeps what is done, so that it can be resumed after any end."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mha2mla_vlm.calibration.activations import Key, States
from mha2mla_vlm.errors import InputError, shown_path
from mha2mla_vlm.utils.distributed import process_index, wait_for_all
from mha2mla_vlm.utils.folders import check_output, put_in_place, writing
from mha2mla_vlm.utils.progress import kept

PROGRESS = "progress.json"
MARK = ".mha2mla"  # in a folder for hidden states: for which output it was made


class FolderStates:
    """Hidden states in files, a folder for each layer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, key: Key) -> Path:
        stream, layer, chat = key
        return self.folder / str(layer) / f"{stream.replace(' ', '-')}-{chat}.safetensors"

    def __getitem__(self, key: Key) -> torch.Tensor:
        path = self._path(key)
        if not path.exists():
            raise KeyError(key)
        return load_file(path)["hidden"]

    def __setitem__(self, key: Key, hidden: torch.Tensor) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"hidden": hidden.cpu().contiguous()}, path)

    def drop(self, layer: int) -> None:
        """Remove all that is before a layer."""
        shutil.rmtree(self.folder / str(layer), ignore_errors=True)


class WorkFolder:
    """`OUTPUT.partial`, beside the output that it becomes: shards that are done, states, and how far it is,
    in steps `done` and in `notes` of what they found.

    `settings` are what the result depends on. Raises `InputError` if the output is there, if the folder
    is there and is not to be resumed, or if it was begun with other settings.
    """

    def __init__(
        self, output: Path, settings: dict[str, Any], *, resume: bool, spill: Path | None = None
    ) -> None:
        self.output = check_output(output)
        self.folder = self.output.with_name(self.output.name + ".partial")
        self.result = self.folder / "result"
        self.settings = json.loads(json.dumps(settings))
        self.done, self.notes = self._begun(resume)
        self.main = process_index() == 0
        self.seconds: dict[str, float] = {}
        self.states_folder = self.folder / "states" if spill is None else self._spilled(spill, resume)
        self.states: States = FolderStates(self.states_folder / str(process_index()))
        wait_for_all()  # all have read how far it is
        with self.writing("progress"):
            if self.main:
                self.result.mkdir(parents=True, exist_ok=True)
            self._write_progress()

    def _spilled(self, spill: Path, resume: bool) -> Path:
        """The folder in `spill` that is only for this output, marked as made for it."""
        unique = hashlib.sha256(str(self.output).encode()).hexdigest()[:12]
        folder = spill / f"{self.output.name}-{unique}.states"
        mark = folder / MARK
        if _exists(folder) and not (mark.is_file() and mark.read_text(encoding="utf-8") == str(self.output)):
            raise InputError(f"{folder} is there and was not made for {self.output}; choose another --spill")
        if process_index() == 0:
            if _exists(folder) and not (resume and self.done):
                shutil.rmtree(folder)  # of an earlier run to this output, whose work folder is gone
            try:
                folder.mkdir(parents=True, exist_ok=True)
                mark.write_text(str(self.output), encoding="utf-8")
            except OSError as error:
                raise InputError(
                    f"--spill {shown_path(spill)} cannot be written to: {error.strerror}"
                ) from None
        return folder

    def _begun(self, resume: bool) -> tuple[int, dict[str, Any]]:
        """How far an earlier run came, if there was one."""
        path = self.folder / PROGRESS
        if not self.folder.exists():
            return 0, {}
        if not resume:
            raise InputError(
                f"{self.folder} holds a conversion that was interrupted; resume with --resume, or remove it"
            )
        begun = self.folder.is_dir() and {each.name for each in self.folder.iterdir()} <= {
            "result",
            "states",
            "kept",
            "progress.tmp",
        }
        if begun and not path.exists():  # it ended before anything was done, or as it was tidied up
            return 0, {}
        try:
            progress = json.loads(path.read_text(encoding="utf-8"))
            known, done, notes = (progress[key] for key in ("settings", "done", "notes"))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            known = done = notes = None
        if not (type(known) is dict and type(notes) is dict and type(done) is int and done >= 0):
            raise InputError(
                f"{self.folder} is not the work folder of a conversion; choose another output, or move it"
            )
        if known != self.settings:
            other = sorted(
                k for k in known.keys() | self.settings.keys() if known.get(k) != self.settings.get(k)
            )
            raise InputError(
                f"{self.folder} was begun with another {', '.join(other)}; give the same, or remove it"
            )
        # without it, it ended as it was tidied up, and what it made was moved away since
        return (done, notes) if self.result.is_dir() else (0, {})

    def _write_progress(self) -> None:
        if not self.main:
            return
        path = self.folder / PROGRESS
        temporary = path.with_suffix(".tmp")
        progress = {"done": self.done, "notes": self.notes, "settings": self.settings}
        temporary.write_text(json.dumps(progress), encoding="utf-8")
        temporary.rename(path)

    def write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a shard of the result, whole or not at all; the first process does."""
        if self.main:
            _write_tensors(self.result / name, tensors)

    def keep(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write tensors that later steps need (`kept`); the first process does."""
        if self.main:
            (self.folder / "kept").mkdir(exist_ok=True)
            _write_tensors(self._kept(name), tensors)

    def kept(self, name: str) -> dict[str, torch.Tensor]:
        """What an earlier step left."""
        return load_file(self._kept(name))

    def _kept(self, name: str) -> Path:
        return self.folder / "kept" / f"{name}.safetensors"

    def finished_step(self, *, drop: int | None = None) -> None:
        """What a step made is written; the states before layer `drop` are not needed any more."""
        self.done += 1
        wait_for_all()  # states of all processes are there
        self._write_progress()
        wait_for_all()
        if drop is not None:
            self.states.drop(drop)

    def finish(self) -> None:
        """Make the result the output, and remove the rest."""
        wait_for_all()
        if not self.main:
            return
        with kept(self.folder, "resume with --resume"):
            put_in_place(self.result, self.output)
        (self.folder / PROGRESS).unlink()
        for folder in (self.states_folder, self.folder / "kept"):
            shutil.rmtree(folder, ignore_errors=True)
        if not any(self.folder.iterdir()):  # else there is something that is not ours
            self.folder.rmdir()

    def writing(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Within the context, a full disk is said in one line, and that what was done before is kept."""
        return writing(self.folder, f"{what}: ", "; what is done is kept, resume with --resume")


def _exists(path: Path) -> bool:
    """Whether it is there; of a name that cannot be, making it says why."""
    try:
        return path.exists()
    except OSError:
        return False


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary, metadata={"format": "pt"})
    temporary.rename(path)
