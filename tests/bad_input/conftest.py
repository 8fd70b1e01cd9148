import shutil
from pathlib import Path

import pytest
from helpers import original, random_mla

from mha2mla_vlm import save
from mha2mla_vlm.zoo.chats import write_chats

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """Good files: an original, a conversion of random weights, chats, a published checkpoint."""
    folder = tmp_path_factory.mktemp("good")
    save(*original("llava"), folder / "model")
    save(*random_mla("llava"), folder / "small")
    (folder / "data").mkdir()
    write_chats("llava", folder / "data", split="train", count=5, seed=0)
    published = FIXTURES / "published" / "llava"
    shutil.copytree(published / "stage2", folder / "published")
    shutil.copy(published / "ranks.pth", folder / "ranks.pth")
    return folder
