"""Models on disk, and vLLM engines within this process that end with their test."""

import contextlib
import gc
import os
import shutil

import pytest
import torch
from helpers import random_mla
from safetensors.torch import load_file, save_file

from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.pipeline import convert
from mha2mla_vlm.model.checkpoint import load, load_processor, save
from mha2mla_vlm.model.shipped import zoo_path
from mha2mla_vlm.zoo.chats import zoo_records

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
SIZES = {"rope_dim": [16, 8, 32, 16], "rank": [40, 64, 24, 40]}  # not the same in all layers
ALL_PAIRS = {"rope_dim": [64, 8, 64, 32], "rank": [40, 64, 24, 40], "seed": 2}  # rotated at read, in some all


@contextlib.contextmanager
def engine(folder, **options):
    """A `vllm.LLM` of a folder, in float32 and without compilation unless told otherwise."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {
        "dtype": "float32",
        "max_model_len": 1024,
        "kv_cache_memory_bytes": 64 << 20,
        "enforce_eager": True,
        "seed": 0,
    }
    llm = LLM(str(folder), **settings | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def as_on_the_hub(name, folder):
    """A zoo model whose tower has the names that vLLM's own classes know: transformers 5 writes others."""
    shutil.copytree(zoo_path(f"zoo:{name}"), folder)
    weights = load_file(folder / "model.safetensors")
    old = {
        key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in weights.items()
    }
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory):
    """Gives folders of random models of low rank, by family, modalities and when layers rotate."""
    made = {}

    def folder(name, modalities=("text", "vision"), rotate_at=("write",) * 4):
        key = name, modalities, rotate_at
        if key not in made:
            sizes = {} if modalities == ("shared",) else SIZES if "write" in rotate_at else ALL_PAIRS
            model, processor = random_mla(name, modalities=modalities, rotate_at=list(rotate_at), **sizes)
            made[key] = save(model, processor, tmp_path_factory.mktemp(name) / "model")
        return made[key]

    return folder


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """Gives folders of converted zoo models, of other sizes in every layer."""
    made = {}

    def folder(name, rotate_at="write", latent_bits="16"):
        key = name, rotate_at, latent_bits
        if key not in made:
            model, processor = load(f"zoo:{name}", dtype=torch.float32), load_processor(f"zoo:{name}")
            chats = zoo_records(name, split="train", samples=24, seed=1)
            config = ConversionConfig(budget=0.25, rotate_at=rotate_at, latent_bits=latent_bits)
            small = convert(model, processor, chats, config)
            made[key] = save(small, processor, tmp_path_factory.mktemp(name) / "small")
        return made[key]

    return folder
