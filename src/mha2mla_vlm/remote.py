"""Parts of safetensors files on the hub, read by ranges of bytes instead of whole files."""

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from mha2mla_vlm.errors import InputError, first_line

DTYPES = {"I64": torch.int64, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def remote_headers(repository: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Address, start of the data and header of every safetensors file of a repository.

    Raises `InputError` if it cannot be read.
    """
    try:
        names = [file.rfilename for file in HfApi().model_info(repository).siblings or ()]
    except (HfHubHTTPError, OSError) as error:
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
