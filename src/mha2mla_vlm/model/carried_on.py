"""What `model.carried` is in the code that a checkpoint carries: saved again, a model carries it on."""

import shutil
from collections.abc import Sequence
from pathlib import Path


def write_code(folder: Path, entry: str, family: str, names: Sequence[str]) -> None:
    """Copy the modules beside this one, which transformers put there, and `ENTRY.py` among them."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name != "__init__.py":
            shutil.copyfile(path, folder / path.name)
