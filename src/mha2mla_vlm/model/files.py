"""The files of a model's folder, looked at before anything is computed by them."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mha2mla_vlm.errors import InputError, reading
from mha2mla_vlm.utils.progress import status

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = ("F64", "F32", "BF16", "F16")


def check_files(folder: Path) -> None:
    """Raise `InputError` if something in a folder is no file, such as a pipe, which would be waited for."""
    for path in folder.iterdir():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise InputError(f"{path} is not a file; remove it")


def weights_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model's weights; raises `InputError` if there are none."""
    index = folder / INDEX
    if not index.exists():
        if (folder / SINGLE).exists():
            return [folder / SINGLE]
        other = sorted(path.name for path in folder.glob("*.bin"))
        found = f"only {', '.join(other)}: save it as safetensors first" if other else "no weights"
        raise InputError(f"{folder} holds {found}; what is read is {SINGLE}, or shards with an index")
    with reading(f"the index {index}"):
        places: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
        if not names or any(Path(name).name != name for name in names):
            raise InputError(f"the index {index} must name files beside it, for each weight one")
    return [folder / name for name in names]


def check_weights(folder: Path) -> None:
    """Raise `InputError` if a file of weights is missing or broken, or holds formats that no model computes
    in: loading would cast them.
    """
    for path in weights_files(folder):
        with reading(f"the weights in {path}"), safe_open(path, framework="pt") as file:
            formats = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        for key, number in formats.items():
            wanted = ("I64",) if key.endswith(".rope_pairs") else FLOATS
            if key.endswith((".weight", ".bias", ".rope_pairs")) and number not in wanted:
                raise InputError(f"{path}: {key} is stored as {number}; known: {', '.join(wanted)}")


def weights_digest(folder: Path) -> dict[str, str]:
    """Size and SHA-256 of each file of weights in a folder, by its name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file, status(f"reading {path.name}"):
            found[path.name] = f"{path.stat().st_size} {hashlib.file_digest(file, 'sha256').hexdigest()}"
    return found
