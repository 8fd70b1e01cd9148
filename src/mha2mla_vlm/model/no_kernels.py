"""What `model.kernels` is in the code that a checkpoint carries: there are none, PyTorch does it."""

from typing import Any, Literal

from mha2mla_vlm.errors import InputError

DecodeBackend = Literal["auto", "torch"]


def find_kernel(backend: DecodeBackend, *tensors: Any) -> Any:
    """None, which is plain PyTorch; raises `InputError` for a backend that has kernels."""
    if backend not in ("auto", "torch"):
        raise InputError(
            f"decode_backend is {backend!r}: kernels come with the package (pip install mha2mla-vlm); "
            "without it use auto or torch"
        )
    return None
