"""Kernels for decoding over latents, and which of them takes given tensors. Importing loads none."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Literal

import torch

from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.absorbed import Piece, Up
from mha2mla_vlm.model.cache.latent import Pieces
from mha2mla_vlm.model.cache.pages import Paged
from mha2mla_vlm.model.rebuilt import Rebuilt

DecodeBackend = Literal["auto", "torch", "triton", "cpp"]
BACKENDS: tuple[DecodeBackend, ...] = ("auto", "torch", "triton", "cpp")
Decode = Callable[..., torch.Tensor]
HAS_TRITON = find_spec("triton") is not None


def find_kernel(
    backend: DecodeBackend,
    q_rope: torch.Tensor,
    q_nope: torch.Tensor,
    ups: Sequence[Up],
    stored: Piece | Pieces | Paged,
    mask: torch.Tensor | None,
) -> Decode | None:
    """The `decode` of the kernel to use on these tensors; None for plain PyTorch.

    `auto` is Triton on a GPU, the C++ kernel on a CPU, and PyTorch where those cannot run, as where there
    are gradients. Both kernels have the arguments of `cpu_decode.decode`. Raises `InputError` for an
    unknown backend. Where keys are rotated at read there are a Triton and a C++ kernel of their own.
    """
    if backend not in BACKENDS:
        raise InputError(f"decode_backend is {backend!r}; use one of {', '.join(BACKENDS)}")
    weights = (up.weight for up in ups)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q_rope, q_nope, *weights)):
        return None
    on_gpu = q_rope.is_cuda
    if isinstance(stored, Rebuilt):
        return _find_rotated(backend, q_rope, q_nope, ups, stored, mask)
    if backend == "triton" or (backend == "auto" and on_gpu and HAS_TRITON):
        from mha2mla_vlm.model.kernels import triton_decode

        return triton_decode.decode if triton_decode.can_run(q_rope, q_nope, ups, stored) else None
    if backend == "cpp" or (backend == "auto" and not on_gpu):
        from mha2mla_vlm.model.kernels import cpu_decode

        return cpu_decode.decode if cpu_decode.can_run(q_rope, q_nope, ups, stored, mask) else None
    return None


def _find_rotated(
    backend: DecodeBackend,
    q_rope: torch.Tensor,
    q_nope: torch.Tensor,
    ups: Sequence[Up],
    stored: Rebuilt,
    mask: torch.Tensor | None,
) -> Decode | None:
    """The same for keys that are rotated at read."""
    if backend == "triton" or (backend == "auto" and q_rope.is_cuda and HAS_TRITON):
        from mha2mla_vlm.model.kernels import triton_rotated

        return triton_rotated.decode if triton_rotated.can_run(q_rope, q_nope, ups, stored) else None
    if backend == "cpp" or (backend == "auto" and not q_rope.is_cuda):
        from mha2mla_vlm.model.kernels import cpu_rotated

        return cpu_rotated.decode if cpu_rotated.can_run(q_rope, q_nope, ups, stored, mask) else None
    return None
