"""The wait for PyTorch and transformers, which takes seconds and is said."""

import contextlib
from collections.abc import Iterator

from mha2mla_vlm.utils.progress import status


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Within the context a command imports what it runs on; transformers is quiet from then on."""
    with status("loading PyTorch and transformers"):
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        yield
