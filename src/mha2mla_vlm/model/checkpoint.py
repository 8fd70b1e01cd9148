"""Folders of models: strict load, and a write that is whole or not there."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from mha2mla_vlm.errors import InputError, reading, shown_path
from mha2mla_vlm.model.card import write_card
from mha2mla_vlm.model.files import check_files, check_weights
from mha2mla_vlm.model.modeling import register
from mha2mla_vlm.model.shipped import ZOO_PREFIX, zoo_path
from mha2mla_vlm.model.soundness import check_config, check_finite, check_stored, loading_errors
from mha2mla_vlm.utils.downloads import download
from mha2mla_vlm.utils.folders import new_folder
from mha2mla_vlm.utils.progress import status
from mha2mla_vlm.utils.remote import HUB_ERRORS, away_from, is_hub_id, why

# of a model, for which none is code
FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md")
LOADED = ("config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
HUB_OPTIONS = ("token", "revision", "cache_dir")  # and with these, which files `from_pretrained` takes
OTHER_FILES = ("local_files_only", "force_download", "subfolder", "variant")


def resolve(name: str | Path) -> str:
    """The folder or hub id that a model's name stands for; `zoo:NAME` is a shipped model."""
    text = str(name)
    return str(zoo_path(text)) if text.startswith(ZOO_PREFIX) else text


def load_config(name: str | Path, **kwargs: Any) -> PreTrainedConfig:
    """Config of an original or a converted model; raises `InputError` if it is not a sound one of a
    supported family. Keyword arguments go to `from_pretrained`.
    """
    with status(f"reading the config of {shown_path(name)}"):
        register()
    source = resolve(name)
    folder = Path(source)
    if folder.is_dir():
        check_files(folder)
        if not (folder / "config.json").exists():
            raise InputError(f"{source} holds no config.json; give the folder of a model")
    away = away_from(source)
    options = _cached(away) | {"trust_remote_code": False} | kwargs
    what = f"a model config from {shown_path(source)}"
    with status(f"reading the config of {shown_path(name)}"), reading(what, partial(why, away=away)):
        check_stored(PreTrainedConfig.get_config_dict(source, **options)[0])
        config = AutoConfig.from_pretrained(source, **options)
        check_config(config)
    return config


def load(name: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load an original or a converted model from a folder, a hub id or `zoo:NAME`.

    Keyword arguments go to `from_pretrained`; `dtype` is by default the one stored. Raises
    `InputError` for an unsupported family, and for weights that are broken, missing or misshaped.
    """
    hub = {key: kwargs[key] for key in (*HUB_OPTIONS, *OTHER_FILES) if key in kwargs and key != "variant"}
    config = load_config(name, **hub)
    source = resolve(name)
    away = away_from(source)
    options = _cached(away) | {"dtype": "auto", "trust_remote_code": False} | kwargs
    options["output_loading_info"] = True
    folder, converted = Path(source), getattr(config, "mla", None) is not None
    if not converted:
        options["ignore_mismatched_sizes"] = True  # refused below, by name, as converted models do themselves
    stored = converted or any(folder.glob("*.safetensors*"))
    what = f"the weights of {shown_path(source)}"
    if is_hub_id(source) and away is None and not any(key in kwargs for key in OTHER_FILES):
        with reading(what):  # which `from_pretrained` would download silently
            download(source, LOADED, **hub)
    with status(f"loading the weights of {shown_path(name)}"), reading(what, partial(why, away=away)):
        if folder.is_dir() and stored and getattr(config, "quantization_config", None) is None:
            check_weights(folder)
        model, info = AutoModelForImageTextToText.from_pretrained(source, **options)
    if found := loading_errors(info):
        raise InputError(f"the weights of {shown_path(source)} are not those of the config: {found}")
    check_finite(model)
    return model.eval()


def _cached(away: str | None) -> dict[str, Any]:
    """The option to read only what is in the cache, if the hub cannot be reached."""
    return {} if away is None else {"local_files_only": True}


def local_folder(name: str | Path) -> Path:
    """The folder of a model that is local, from the zoo, or of the hub, downloaded if it is not there."""
    source = Path(resolve(name))
    if source.is_dir():
        return source
    away = away_from(str(name))
    try:
        return download(str(name), FILES, **_cached(away))
    except (*HUB_ERRORS, ValueError, HFValidationError) as error:
        reason = why(error, away)
        raise InputError(f"{name!r} is no folder, and cannot be downloaded: {reason}") from None


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
    source = resolve(name)
    away = away_from(source)
    what = f"the processor of {shown_path(source)}"
    with status(f"loading the processor of {shown_path(name)}"), reading(what, partial(why, away=away)):
        register()
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False, **_cached(away))
        processor.tokenizer.padding_side = "left"
    return processor


def save(model: PreTrainedModel, processor: ProcessorMixin | None, output: str | Path) -> Path:
    """Write a model and, if there is one, its processor as one transformers folder, whole or not at all."""
    with new_folder(output) as folder, status(f"writing {shown_path(output)}"):
        model.save_pretrained(folder)
        if getattr(model.config, "mla", None) is not None:
            name, findings = Path(output).resolve().name, getattr(model, "findings", None)
            write_card(model.config, folder, name=name, findings=findings)
        if processor is not None:
            processor.save_pretrained(folder)
    return Path(output)
