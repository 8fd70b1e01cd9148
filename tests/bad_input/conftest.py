import json
import shutil
from pathlib import Path

import pytest
from helpers import original, random_mla
from safetensors.torch import load_file, save_file

from mha2mla_vlm import save
from mha2mla_vlm.zoo.chats import write_chats

FIXTURES = Path(__file__).parents[1] / "fixtures"


def in_shards(folder, target):
    """A copy whose weights are in two files with an index."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    places = {key: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, key in enumerate(weights)}
    for name in set(places.values()):
        save_file({k: v for k, v in weights.items() if places[k] == name}, target / name, {"format": "pt"})
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """Good files: an original, a conversion of random weights, chats, a published checkpoint."""
    folder = tmp_path_factory.mktemp("good")
    save(*original("llava"), folder / "model")
    save(*random_mla("llava"), folder / "small")
    in_shards(folder / "small", folder / "sharded")
    (folder / "data").mkdir()
    write_chats("llava", folder / "data", split="train", samples=5, seed=0)
    published = FIXTURES / "published" / "llava"
    shutil.copytree(published / "stage2", folder / "published")
    shutil.copy(published / "ranks.pth", folder / "ranks.pth")
    return folder
