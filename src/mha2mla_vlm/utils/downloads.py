"""Models of the hub on their way into its cache, with bytes and percentages for people."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from mha2mla_vlm.utils.distributed import process_index
from mha2mla_vlm.utils.progress import hidden, status

logger = logging.getLogger(__name__)
BARS = "huggingface_hub"  # names of the hub client's own bars begin so


def download(name: str, patterns: Sequence[str], **options: Any) -> Path:
    """The folder in the hub's cache with the files of a model that match; what is not there is downloaded.

    On a terminal the hub's client shows how much there is of how many bytes; in any case a line says what is
    downloaded. The first of several processes says so for all. Options go to `snapshot_download`, whose
    errors are not caught.
    """
    asked: dict[str, Any] = {"allow_patterns": list(patterns), **options}
    if not options.get("local_files_only"):
        with status(f"asking the hub for {name}"):
            files = [each for each in snapshot_download(name, dry_run=True, **asked) if each.will_download]
        if files and process_index() == 0:
            size = sum(each.file_size or 0 for each in files) / 1e6
            logger.info("downloading %s: %s MB", name, f"{size:,.1f}")
            with hub_bars():
                return Path(snapshot_download(name, **asked))
    return Path(snapshot_download(name, **asked))


@contextlib.contextmanager
def hub_bars() -> Iterator[None]:
    """Within the context, the hub's client may show its own bars, in the place of ours.

    It shows them on a terminal only, and never where HF_HUB_DISABLE_PROGRESS_BARS says so.
    """
    switched = are_progress_bars_disabled(BARS) and not HF_HUB_DISABLE_PROGRESS_BARS
    with hidden():
        if switched:  # as transformers does, once it is to be quiet
            enable_progress_bars(BARS)
        try:
            yield
        finally:
            if switched:
                disable_progress_bars(BARS)
