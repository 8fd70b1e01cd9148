"""Convert vision-language models to multi-head latent attention, and run them with a small cache.

Importing this package does nothing but define names; they are loaded when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mha2mla_vlm.config import MLAConfig
    from mha2mla_vlm.conversion.config import ConversionConfig
    from mha2mla_vlm.conversion.pipeline import convert, make_profile
    from mha2mla_vlm.data.records import Record
    from mha2mla_vlm.data.sources import load_records
    from mha2mla_vlm.errors import InputError
    from mha2mla_vlm.evaluation.answers import evaluate
    from mha2mla_vlm.model.cache.latent import LatentCache, bytes_per_token, cache_bytes
    from mha2mla_vlm.model.checkpoint import load, load_processor, save
    from mha2mla_vlm.model.shipped import zoo_path
    from mha2mla_vlm.training.config import FinetuneConfig
    from mha2mla_vlm.training.run import finetune

__version__ = "0.1.0"

_MODULES = {
    "LatentCache": "model.cache.latent",
    "bytes_per_token": "model.cache.latent",
    "cache_bytes": "model.cache.latent",
    "load": "model.checkpoint",
    "load_processor": "model.checkpoint",
    "save": "model.checkpoint",
    "ConversionConfig": "conversion.config",
    "MLAConfig": "config",
    "convert": "conversion.pipeline",
    "make_profile": "conversion.pipeline",
    "Record": "data.records",
    "load_records": "data.sources",
    "InputError": "errors",
    "evaluate": "evaluation.answers",
    "FinetuneConfig": "training.config",
    "finetune": "training.run",
    "zoo_path": "model.shipped",
}

__all__ = [
    "ConversionConfig",
    "FinetuneConfig",
    "InputError",
    "LatentCache",
    "MLAConfig",
    "Record",
    "bytes_per_token",
    "cache_bytes",
    "convert",
    "evaluate",
    "finetune",
    "load",
    "load_processor",
    "load_records",
    "make_profile",
    "save",
    "zoo_path",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
