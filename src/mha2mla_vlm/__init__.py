"""Convert vision-language models to multi-head latent attention, and run them with a small cache.

Importing this package does nothing but define names; they are loaded when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mha2mla_vlm.cache import LatentCache, bytes_per_token, cache_bytes
    from mha2mla_vlm.checkpoint import load, load_processor, save
    from mha2mla_vlm.config import ConversionConfig, MLAConfig
    from mha2mla_vlm.conversion import convert, make_profile
    from mha2mla_vlm.data import Record
    from mha2mla_vlm.errors import InputError
    from mha2mla_vlm.evaluation import evaluate
    from mha2mla_vlm.sources import load_records
    from mha2mla_vlm.training.config import FinetuneConfig
    from mha2mla_vlm.training.run import finetune
    from mha2mla_vlm.zoo import zoo_path

__version__ = "0.1.0"

_MODULES = {
    "LatentCache": "cache",
    "bytes_per_token": "cache",
    "cache_bytes": "cache",
    "load": "checkpoint",
    "load_processor": "checkpoint",
    "save": "checkpoint",
    "ConversionConfig": "config",
    "MLAConfig": "config",
    "convert": "conversion",
    "make_profile": "conversion",
    "Record": "data",
    "load_records": "sources",
    "InputError": "errors",
    "evaluate": "evaluation",
    "FinetuneConfig": "training.config",
    "finetune": "training.run",
    "zoo_path": "zoo",
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
