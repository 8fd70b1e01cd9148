"""What a converted model was made of: its name in what is shared, and where it is found again."""

from pathlib import Path

from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.checkpoint import load_config, resolve
from mha2mla_vlm.model.shipped import ZOO_FOLDER, ZOO_PREFIX


def shared_name(name: str | Path) -> str:
    """A model's or a data set's name for what is shared: of a path its last part, else the whole."""
    text = str(name)
    path = Path(text)
    if path.is_absolute() and path.parent == ZOO_FOLDER:
        return ZOO_PREFIX + path.name
    return path.resolve().name if path.is_absolute() or path.exists() else text


def original_of(checkpoint: str | Path) -> str | None:
    """Where the original of a converted checkpoint is, as far as is known; of an original, itself.

    A folder is known by its name and looked for beside the checkpoint.
    """
    mla = getattr(load_config(checkpoint), "mla", None)
    if mla is None:
        return str(checkpoint)
    name = mla.get("original")
    if name is None or name.startswith(ZOO_PREFIX) or "/" in name:  # or of the hub
        return name
    folder = Path(resolve(checkpoint))
    beside = folder.resolve().parent / name
    return str(beside) if folder.is_dir() and (beside / "config.json").is_file() else None


def original_is_missing(checkpoint: str | Path, option: str) -> InputError:
    """The error for a checkpoint whose original is needed and not known; `option` is how to give it."""
    name = load_config(checkpoint).mla.get("original")
    if name is None:
        return InputError(f"{checkpoint} does not say what it was converted from; give {option}")
    return InputError(f"{checkpoint} was converted from {name!r}, which is not beside it; give {option}")
