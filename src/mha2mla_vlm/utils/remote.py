"""Parts of safetensors files on the hub, read by ranges of bytes instead of whole files."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from mha2mla_vlm.errors import InputError, first_line

# OSError, and the HTTPError of httpx or httpx2, whichever this version of the hub's client is made with
HUB_ERRORS: tuple[type[Exception], ...] = HfHubHTTPError.__bases__
TIMEOUT = 5.0  # seconds to reach the hub
DTYPES = {"I64": torch.int64, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def is_hub_id(name: str) -> bool:
    """Whether a name is no folder here and could be that of a repository of the hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def unreachable() -> str | None:
    """Why the hub cannot be reached, None if it can: its client would try again for most of a minute."""
    endpoint = HfApi().endpoint
    try:
        get_session().head(endpoint, timeout=TIMEOUT)
    except HUB_ERRORS as error:
        return f"{endpoint} cannot be reached ({first_line(error)})"
    return None


def away_from(name: str) -> str | None:
    """Why what is named must be in the cache: it is of the hub, which cannot be reached; else None."""
    return unreachable() if is_hub_id(name) else None


def why(error: Exception, away: str | None) -> str:
    """Why something of the hub could not be read, in a line."""
    return first_line(error) if away is None else f"it is no folder, not in the cache, and {away}"


def remote_headers(repository: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Address, start of the data and header of every safetensors file of a repository.

    Raises `InputError` if it cannot be read.
    """
    try:
        names = [file.rfilename for file in HfApi().model_info(repository).siblings or ()]
    except HUB_ERRORS as error:
        raise InputError(f"cannot list the files of {repository!r}: {first_line(error)}") from None
    for name in sorted(name for name in names if name.endswith(".safetensors")):
        address = hf_hub_url(repository, name)
        size = struct.unpack("<Q", _bytes(address, 0, 8))[0]
        yield address, 8 + size, json.loads(_bytes(address, 8, 8 + size))


def remote_tensors(repository: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a repository whose names are `wanted`."""
    for address, data, header in remote_headers(repository):
        for name, entry in header.items():
            if name != "__metadata__" and wanted(name):
                start, stop = (data + offset for offset in entry["data_offsets"])
                buffer = bytearray(_bytes(address, start, stop))
                yield name, torch.frombuffer(buffer, dtype=DTYPES[entry["dtype"]]).view(entry["shape"])


def _bytes(address: str, start: int, stop: int) -> bytes:
    headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}"}
    response = get_session().get(address, headers=headers, follow_redirects=True)
    hf_raise_for_status(response)
    content = bytes(response.content)
    return content if response.status_code == 206 else content[start:stop]
