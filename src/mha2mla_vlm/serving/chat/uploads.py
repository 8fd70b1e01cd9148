"""Where gradio keeps images while a page is served."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

FOLDER = "GRADIO_TEMP_DIR"  # gradio has no other way to be told


@contextlib.contextmanager
def uploads_folder() -> Iterator[Path]:
    """A folder for what gradio keeps, of this process only, that is gone after the context.

    It is where the user wants gradio's files, else where temporary files are.
    """
    wanted = os.environ.get(FOLDER)
    if wanted:
        Path(wanted).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mha2mla-chat-", dir=wanted or None) as folder:
        os.environ[FOLDER] = folder
        try:
            yield Path(folder)
        finally:
            if wanted is None:
                del os.environ[FOLDER]
            else:
                os.environ[FOLDER] = wanted
