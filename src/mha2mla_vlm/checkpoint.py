"""Folders of models: strict load, and a write that is whole or not there."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from mha2mla_vlm.card import write_card
from mha2mla_vlm.config import AttentionSizes, MLAConfig
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.families import get_family
from mha2mla_vlm.modeling import register
from mha2mla_vlm.remote import HUB_ERRORS, away_from, why
from mha2mla_vlm.utils.folders import new_folder
from mha2mla_vlm.zoo import ZOO_PREFIX, zoo_path

FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")  # of a model, for which none is code


def resolve(name: str | Path) -> str:
    """The folder or hub id that a model's name stands for; `zoo:NAME` is a shipped model."""
    text = str(name)
    return str(zoo_path(text)) if text.startswith(ZOO_PREFIX) else text


def load_config(name: str | Path, **kwargs: Any) -> PreTrainedConfig:
    """Config of an original or a converted model; raises `InputError` if it is not a sound one of a
    supported family. Keyword arguments go to `from_pretrained`.
    """
    register()
    source = resolve(name)
    away = away_from(source)
    try:
        config = AutoConfig.from_pretrained(source, **_cached(away) | {"trust_remote_code": False} | kwargs)
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise InputError(f"cannot read a model config from {source!r}: {why(error, away)}") from None
    get_family(config.model_type)
    if getattr(config, "mla", None) is not None:
        MLAConfig.from_dict(config.mla).check(AttentionSizes.of(config))
    return config


def load(name: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load an original or a converted model from a folder, a hub id or `zoo:NAME`.

    Keyword arguments go to `from_pretrained`; `dtype` is by default the one stored. Raises
    `InputError` for an unsupported family, and for weights that are broken, missing or misshaped.
    """
    hub = ("token", "revision", "cache_dir", "local_files_only", "force_download", "subfolder")
    config = load_config(name, **{key: kwargs[key] for key in hub if key in kwargs})
    source = resolve(name)
    away = away_from(source)
    options = _cached(away) | {"dtype": "auto", "trust_remote_code": False} | kwargs
    options["output_loading_info"] = True
    if Path(source).is_dir() and getattr(config, "quantization_config", None) is None:
        check_number_formats(Path(source))
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(source, **options)
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError, ImportError, SafetensorError) as error:
        raise InputError(f"cannot load the weights of {source!r}: {why(error, away)}") from error
    for what in ("missing", "unexpected"):
        if keys := sorted(info[f"{what}_keys"]):
            listed = ", ".join(keys[:5])
            raise InputError(f"the weights of {source!r} are not those of the model; {what} keys: {listed}")
    return model.eval()


def _cached(away: str | None) -> dict[str, Any]:
    """The option to read what is in the cache alone, if the hub cannot be reached."""
    return {} if away is None else {"local_files_only": True}


def local_folder(name: str | Path) -> Path:
    """The folder of a model that is local, from the zoo, or of the hub, downloaded if it is not there."""
    source = Path(resolve(name))
    if source.is_dir():
        return source
    away = away_from(str(name))
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(FILES), **_cached(away)))
    except (*HUB_ERRORS, ValueError, HFValidationError) as error:
        reason = why(error, away)
        raise InputError(f"{name!r} is no folder, and cannot be downloaded: {reason}") from None


def check_number_formats(folder: Path) -> None:
    """Raise `InputError` for weights in formats that no model computes in: loading would cast them."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                formats = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
        for key, number in formats.items():
            wanted = ("I64",) if key.endswith(".rope_pairs") else ("F64", "F32", "BF16", "F16")
            if key.endswith((".weight", ".bias", ".rope_pairs")) and number not in wanted:
                raise InputError(f"{path}: {key} is stored as {number}; known: {', '.join(wanted)}")


def weights_digest(folder: Path) -> dict[str, str]:
    """Size and SHA-256 of each file of weights in a folder, by its name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = f"{path.stat().st_size} {hashlib.file_digest(file, 'sha256').hexdigest()}"
    return found


def pick_device(name: str) -> torch.device:
    """A device by its name, `auto` for a GPU if there is one; raises `InputError` if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta" or (device.type == "cpu" and device.index):
            raise RuntimeError("nothing is computed there")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(
            f"device {name!r} is not available here; give auto, cpu, cuda or cuda:INDEX"
        ) from None
    return device


def load_processor(name: str | Path) -> ProcessorMixin:
    """Load the processor that belongs to a model; its padding is on the left, for generation."""
    register()
    source = resolve(name)
    away = away_from(source)
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False, **_cached(away))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the processor of {source!r}: {why(error, away)}") from None
    processor.tokenizer.padding_side = "left"
    return processor


def save(model: PreTrainedModel, processor: ProcessorMixin | None, output: str | Path) -> Path:
    """Write a model and, if there is one, its processor as one transformers folder, whole or not at all."""
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        if getattr(model.config, "mla", None) is not None:
            write_card(model.config, folder)
        if processor is not None:
            processor.save_pretrained(folder)
    return Path(output)
