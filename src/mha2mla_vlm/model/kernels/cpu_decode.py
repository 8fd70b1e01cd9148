"""The CPU kernel of `cpu_decode.cpp`, which `cpu_library` builds.

It needs Linux on x86-64 with AVX-512 BF16 (AMD from Zen 4 on, Intel from Sapphire Rapids on) and g++.
"""

import ctypes
import platform
from collections.abc import Sequence
from typing import Self

import torch

from mha2mla_vlm.config import LatentBits
from mha2mla_vlm.model.absorbed import Piece, Up
from mha2mla_vlm.model.cache.latent import Pieces
from mha2mla_vlm.model.cache.packed import PackedTokens
from mha2mla_vlm.model.cache.pages import Paged
from mha2mla_vlm.model.cache.quantization import Quantized
from mha2mla_vlm.model.cache.quantized import QuantizedTokens
from mha2mla_vlm.model.kernels.cpu_library import load_library, processor
from mha2mla_vlm.model.kernels.stored import numbers
from mha2mla_vlm.utils.compat import is_plain_tensor

TILE = 64  # tokens, as in cpu_product.h
RANGES = torch.float16
_NUMBERS, _BY_CHANNEL, _INTEGERS = range(3)  # as in cpu_source.h

_long, _int, _pointer = ctypes.c_long, ctypes.c_int, ctypes.c_void_p


class _Up(ctypes.Structure):
    _fields_ = (
        ("key", _pointer), ("value", _pointer), ("group", _long),
        ("key_bias", _pointer), ("value_bias", _pointer), ("bias_group", _long),
    )  # fmt: skip


class _Source(ctypes.Structure):
    _fields_ = (
        ("stored", _pointer), ("batch", _long), ("head", _long), ("token", _long),
        ("codes", _pointer), ("low", _pointer), ("step", _pointer),
        *((name, _long) for name in (
            "coded", "code_batch", "code_head", "code_token", "range_batch", "range_head",
        )),
        ("bits", _int), ("block", _int),
        ("pages", _pointer), ("pages_row", _long), ("page", _long),
        ("form", _int), ("channels", _int * 4),
    )  # fmt: skip

    @classmethod
    def of(cls, x: torch.Tensor, bits: LatentBits | None = None) -> Self:
        """Numbers or integers `[B, heads, S, width]`, or bytes of channels of these `bits`."""
        batch, head, token = (each * x.element_size() for each in x.stride()[:3])
        form = _BY_CHANNEL if bits is not None else _INTEGERS if x.dtype == torch.int8 else _NUMBERS
        where = {"stored": x.data_ptr(), "batch": batch, "head": head, "token": token}
        return cls(**where, form=form, channels=(_int * 4)(*(bits or ())))

    def lie_in(self, stored: Paged) -> None:
        """Take the numbers, `[B, heads, N, width]`, for pages."""
        self.pages, self.pages_row, self.page = stored.table.data_ptr(), stored.table.stride(0), stored.size

    def precede(self, coded: Quantized) -> None:
        """Put quantised tokens before the others."""
        self.codes, self.low, self.step = (x.data_ptr() for x in coded.tensors)
        self.code_batch, self.code_head, _, self.code_token, _ = coded.codes.stride()
        self.range_batch, self.range_head = coded.low.stride()[:2]
        self.coded, self.block, self.bits = coded.tokens, coded.codes.shape[3], coded.bits


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _int) for name in (
            "batch", "groups", "row_group", "new_tokens", "rope", "nope", "head", "rank", "kinds", "threads",
        )),
        ("total", _long), ("scaling", ctypes.c_float),
        ("q_rope", _pointer), ("q_nope", _pointer), ("up", _Up * 2),
        ("latent", _Source), ("k_rope", _Source),
        ("visual", _pointer), ("visual_batch", _long),
        ("mask", _pointer), ("mask_batch", _long), ("mask_row", _long),
        ("lengths", _pointer), ("out", _pointer),
    )  # fmt: skip


def can_run(
    q_rope: torch.Tensor,
    q_nope: torch.Tensor,
    ups: Sequence[Up],
    stored: Piece | Pieces | Paged,
    mask: torch.Tensor | None,
) -> bool:
    """Whether the kernel takes these tensors, and can be built here."""
    if not _is_known(stored):
        return False
    held = stored.recent if isinstance(stored, QuantizedTokens) else numbers(stored)
    tensors = (q_rope, q_nope, *held, *(up.weight for up in ups))
    if not all(map(is_plain_tensor, tensors)) or not all(up.weight.is_contiguous() for up in ups):
        return False  # memory is read as it lies
    if any(x.device.type != "cpu" or x.dtype != torch.bfloat16 for x in tensors):
        return False
    even = q_rope.shape[-1] % 2 == 0
    known_mask = mask is None or mask.dtype == torch.bool
    if not even or not known_mask or torch.compiler.is_compiling():
        return False
    return library() is not None


def decode(
    q_rope: torch.Tensor,
    q_nope: torch.Tensor,
    ups: Sequence[Up],
    scaling: float,
    stored: Piece | Pieces | Paged,
    visual: torch.Tensor | None,
    mask: torch.Tensor | None = None,
    filled: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of `q_rope [B, H, T, R]` and `q_nope [B, H, T, N]` over latents, `[B, T, H, D]`.

    `stored` is tensors, quantised tokens as `cache.quantized` keeps them (ranges in float16), rows of bytes,
    or pages of either.
    `visual [B, S]` is the modality of tokens (None: one modality), `mask` a `dense_mask` of bool, and
    `filled` the number of tokens in use, if a mask hides the others.
    """
    call_library = library()
    assert call_library is not None, "can_run says so"
    batch, heads, new, _ = q_rope.shape
    groups, head_dim = ups[0].kv_heads, q_rope.shape[-1] + q_nope.shape[-1]
    q_rope, q_nope = q_rope.contiguous(), q_nope.contiguous()
    stored = stored.for_kernel() if isinstance(stored, Paged) else stored
    held, bits = _held(stored)
    latent, k_rope = (x if x.stride(-1) == 1 else x.contiguous() for x in held)
    sources, total = _sources(stored, latent, k_rope, bits)
    out = q_rope.new_empty(batch, heads, new, head_dim)
    call = _Call(
        batch=batch, groups=groups, row_group=heads * new // groups, new_tokens=new,
        rope=q_rope.shape[-1], nope=q_nope.shape[-1], head=head_dim, rank=ups[0].weight.shape[-1],
        kinds=len(ups), threads=torch.get_num_threads(), scaling=scaling,
        total=total if filled is None else int(filled),
        q_rope=q_rope.data_ptr(), q_nope=q_nope.data_ptr(), up=(_Up * 2)(*map(_up_of, ups)),
        latent=sources[0], k_rope=sources[1], out=out.data_ptr(),
    )  # fmt: skip
    if visual is not None and len(ups) == 2:
        visual = visual if visual.stride(-1) == 1 else visual.contiguous()
        call.visual, call.visual_batch = visual.data_ptr(), visual.stride(0)
    if mask is not None:
        rows = (mask[:, 0] if mask.ndim == 4 else mask).contiguous()
        rows = rows.expand(batch, new, -1)
        call.mask, call.mask_batch, call.mask_row = rows.data_ptr(), rows.stride(0), rows.stride(1)
    if isinstance(stored, Paged):
        call.lengths = stored.lengths.data_ptr()
    call_library.mha2mla_decode(ctypes.byref(call))
    return out.transpose(1, 2)


def _held(stored: Piece | Pieces | Paged) -> tuple[tuple[torch.Tensor, torch.Tensor], LatentBits | None]:
    """Latents `[B, 1, S, r]` and rotated keys `[B, G, S, R]` that are not quantised; of rows of bytes, which
    have `bits`, bytes `[B, 1, S, b]` and int8.
    """
    if isinstance(stored, PackedTokens):
        return (stored.rows[:, None], stored.k_rope), stored.bits
    if isinstance(stored, QuantizedTokens):
        return stored.recent, None
    assert not isinstance(stored, Pieces), "can_run says so"
    latent, k_rope = stored.views() if isinstance(stored, Paged) else stored
    packed = stored.packed if isinstance(stored, Paged) else None
    return (latent[:, None], k_rope), None if packed is None else packed.bits


def _sources(
    stored: Piece | Pieces | Paged, latent: torch.Tensor, k_rope: torch.Tensor, bits: LatentBits | None
) -> tuple[tuple[_Source, _Source], int]:
    """Where latents and rotated keys lie, and how many tokens there are, at most, in a row of the batch."""
    sources = _Source.of(latent, bits), _Source.of(k_rope)
    if isinstance(stored, Paged):
        for source in sources:
            source.lie_in(stored)
        return sources, stored.room
    if isinstance(stored, QuantizedTokens):
        for source, coded in zip(sources, stored.coded, strict=True):
            if coded is not None:
                source.precede(coded)
        return sources, stored.length
    return sources, latent.shape[2]


def _is_known(stored: Piece | Pieces | Paged) -> bool:
    """Whether tokens lie as the kernel reads them: pages and quantised blocks in whole tiles."""
    if isinstance(stored, Paged):
        return stored.size % TILE == 0
    if isinstance(stored, QuantizedTokens):
        return all(
            coded is None
            or (
                isinstance(coded, Quantized)
                and coded.codes.shape[3] % TILE == 0
                and coded.low.dtype == RANGES
            )
            for coded in stored.coded
        )
    return isinstance(stored, PackedTokens) or not isinstance(stored, Pieces)


def _up_of(up: Up) -> _Up:
    """Where the halves lie in a dense weight and bias."""
    rows, rank = up.weight.shape
    size, each = up.weight.element_size(), rows // up.kv_heads
    key = up.weight.data_ptr()
    bias = (
        (None, None, 0)
        if up.bias is None
        else (up.bias.data_ptr(), up.bias.data_ptr() + up.nope_dim * size, each)
    )
    return _Up(key, key + up.nope_dim * rank * size, each * rank, *bias)


def library() -> ctypes.CDLL | None:
    """The kernel, built if it has to be; None, with the reason in the log, where it cannot be."""
    if platform.machine() != "x86_64" or "avx512_bf16" not in processor():
        return None
    return load_library("cpu_decode")
