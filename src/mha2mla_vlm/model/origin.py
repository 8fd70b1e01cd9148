"""What a converted model was made of: its name, its licence, and where it is found again."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HFValidationError
from yaml import YAMLError

from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.checkpoint import load_config, resolve
from mha2mla_vlm.model.modeling import FINDINGS
from mha2mla_vlm.model.shipped import ZOO_FOLDER, ZOO_PREFIX
from mha2mla_vlm.utils.remote import HUB_ERRORS, away_from

STATED = ("license", "license_name", "license_link", "base_model")


def shared_name(name: str | Path) -> str:
    """A model's or a data set's name for what is shared: of a path its last part, else the whole."""
    text = str(name)
    path = Path(text)
    if path.is_absolute() and path.parent == ZOO_FOLDER:
        return ZOO_PREFIX + path.name
    return path.resolve().name if path.is_absolute() or path.exists() else text


def read_findings(checkpoint: str | Path) -> dict[str, Any]:
    """What the conversion found, if the folder or the repository of a checkpoint holds it."""
    text = _text_of(resolve(checkpoint), FINDINGS)
    return {} if text is None else json.loads(text)


def stated_by(model: str | Path, config: Any) -> dict[str, str]:
    """Licence and base model of a model, by its card and, if that says nothing, its config's `license`.

    Nothing of a card that cannot be read. A `license_link` may be that of a file beside the model.
    """
    if Path(model).parent == ZOO_FOLDER:
        return {"license": "apache-2.0"}
    data = _card(str(model))
    found = {key: data.get(key) for key in STATED}
    if found["license"] is None:
        found["license"] = getattr(config, "license", None)
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _card(model: str) -> ModelCardData:
    """What the card of a model in a folder, or of the hub, says of it."""
    text = _text_of(model, "README.md")
    try:
        return ModelCardData() if text is None else ModelCard(text, ignore_metadata_errors=True).data
    except (ValueError, TypeError, YAMLError):
        return ModelCardData()


def _text_of(model: str, name: str) -> str | None:
    """A text file of a model in a folder, or of the hub; None if there is none that can be read."""
    path = Path(model, name)
    try:
        if not Path(model).is_dir():
            path = Path(hf_hub_download(model, name, local_files_only=away_from(model) is not None))
        return path.read_text(encoding="utf-8")
    except (*HUB_ERRORS, HFValidationError, OSError, ValueError):
        return None


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
