"""The CPU kernel of `cpu_rotated.cpp`, which `cpu_library` builds, for keys that are rotated at read.

Shapes: those of `blocks.py`; M = H / G, Q = H * T rows, r latent dims, D head dim, P = D / 2.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mha2mla_vlm.config import LatentBits
from mha2mla_vlm.model.absorbed import Queries, Sums, Up, absorb, expand
from mha2mla_vlm.model.blocks import Blocks, made_blocks
from mha2mla_vlm.model.cache.latent import Pieces
from mha2mla_vlm.model.cache.packed import PackedTokens
from mha2mla_vlm.model.cache.pages import Paged
from mha2mla_vlm.model.interpolated import plan_key, planned
from mha2mla_vlm.model.kernels.cpu_library import load_library
from mha2mla_vlm.model.kernels.stored import numbers
from mha2mla_vlm.model.modality import Kind
from mha2mla_vlm.model.positions import Tables
from mha2mla_vlm.model.rebuilt import Rebuilt
from mha2mla_vlm.utils.compat import is_plain_tensor

TILE = 64  # tokens, as in cpu_rotated.cpp
WIDTH = 256  # tokens of a block
DTYPES = (torch.float32, torch.bfloat16)

_long, _int, _pointer = ctypes.c_long, ctypes.c_int, ctypes.c_void_p


class _Up(ctypes.Structure):
    _fields_ = (("rope", _pointer), ("bias", _pointer), ("group", _long), ("bias_group", _long))


class _Blocks(ctypes.Structure):
    _fields_ = (
        *((name, _int) for name in ("kind", "made", "terms", "nodes", "count", "width")),
        *((name, _pointer) for name in (
            "start", "stop", "cos", "sin", "basis", "axis", "node", "axes",
        )),
    )  # fmt: skip


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _int) for name in (
            "batch", "groups", "row_group", "new_tokens", "rope", "rank", "kinds", "threads", "plans", "half",
        )),
        ("total", _long), ("q_rope", _pointer), ("q_latent", _pointer * 2), ("text_constant", _pointer),
        ("up", _Up * 2), ("latent", _pointer), ("latent_batch", _long), ("latent_token", _long),
        ("pages", _pointer), ("pages_row", _long), ("page", _long), ("lengths", _pointer),
        ("packed", _int), ("channels", _int * 4),
        ("cos", _pointer), ("sin", _pointer), ("table_batch", _long), ("table_pair", _long),
        ("pairs", _pointer), ("plan", _pointer),
        ("visual", _pointer), ("visual_batch", _long),
        ("mask", _pointer), ("mask_batch", _long), ("mask_row", _long),
        ("sums", _pointer), ("text", _pointer),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What all layers of a step share, as the kernel reads it; `tensors` are those that it points to."""

    blocks: Any
    cos: torch.Tensor  # [B, pairs that are made, S and a tile]
    sin: torch.Tensor
    pairs: torch.Tensor  # [G, C], numbers of those
    tensors: tuple[torch.Tensor, ...]


def can_run(
    q_rope: torch.Tensor,
    q_nope: torch.Tensor,
    ups: Sequence[Up],
    stored: Rebuilt,
    mask: torch.Tensor | None,
) -> bool:
    """Whether the kernel takes these tensors, and can be built here."""
    held = stored.stored
    if (isinstance(held, Pieces) and not isinstance(held, PackedTokens)) or torch.compiler.is_compiling():
        return False
    tensors = (q_rope, q_nope, *numbers(held), *(up.weight for up in ups))
    if not all(map(is_plain_tensor, tensors)) or not all(up.weight.is_contiguous() for up in ups):
        return False  # memory is read as it lies
    if any(x.device.type != "cpu" or x.dtype != q_rope.dtype or x.dtype not in DTYPES for x in tensors):
        return False
    return (mask is None or mask.dtype == torch.bool) and library() is not None


def library() -> ctypes.CDLL | None:
    """The kernel, built if it has to be; None, with the reason in the log, where it cannot be."""
    return load_library("cpu_rotated")


def decode(
    q_rope: torch.Tensor,
    q_nope: torch.Tensor,
    ups: Sequence[Up],
    scaling: float,
    stored: Rebuilt,
    visual: torch.Tensor | None,
    mask: torch.Tensor | None = None,
    filled: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over latents, as `cpu_decode.decode`; the up projections of values are PyTorch's."""
    exact = [up.float() for up in ups]  # products in bfloat16 are slow where they are no instructions
    queries = absorb(q_rope.float(), q_nope.float(), exact, scaling)
    sums = attend(queries, stored, visual, mask, filled, exact)
    return expand(sums, exact, q_rope.shape[2]).to(q_rope.dtype)


def attend(
    queries: Queries,
    stored: Rebuilt,
    visual: torch.Tensor | None,
    mask: torch.Tensor | None = None,
    filled: torch.Tensor | None = None,
    ups: Sequence[Up] | None = None,
) -> Sums:
    """`interpolated.attend_rotated` over tokens whose modality is `visual [B, S]` where their runs are mixed.

    `mask` is a `dense_mask` of bool; `filled` is how many of the S tokens there are, if it hides the others:
    they are not read. `ups` are those of `stored` in float32, if they are there.
    """
    call_library = library()
    assert call_library is not None, "can_run says so"
    ups, (latent, dtype, bits) = ups or [up.float() for up in stored.ups], _latent(stored)
    latent = latent if latent.stride(-1) == 1 else latent.contiguous()
    held = stored.stored.for_kernel() if isinstance(stored.stored, Paged) else None
    batch, kv_heads, rows, rope = queries.rope.shape
    exact = [None if x is None else x.float().contiguous() for x in (queries.rope, *queries.latent)]
    constant = None if queries.text_constant is None else queries.text_constant.float().contiguous()
    plan = _plan(queries, stored)
    shape = (len(ups), batch, kv_heads * rows)
    sums, text = torch.empty(*shape, stored.rank), torch.empty(*shape[1:], 1)
    seen = _rows_of(mask, batch)
    call = _Call(
        batch=batch, groups=kv_heads, row_group=rows, new_tokens=1 if seen is None else seen.shape[1],
        rope=rope, rank=stored.rank, kinds=len(ups), threads=torch.get_num_threads(),
        plans=len(plan.blocks), half=dtype == torch.bfloat16,
        total=stored.length if filled is None else int(filled),
        q_rope=_at(exact[0]), q_latent=(_pointer * 2)(*map(_at, exact[1:])), text_constant=_at(constant),
        up=(_Up * 2)(*map(_up_of, ups)),
        latent=latent.data_ptr(), latent_batch=latent.stride(0), latent_token=latent.stride(1),
        packed=bits is not None, channels=(_int * 4)(*(bits or ())),
        cos=_at(plan.cos), sin=_at(plan.sin), table_pair=plan.cos.stride(1),
        table_batch=plan.cos.stride(0) if len(plan.cos) > 1 else 0,
        pairs=_at(plan.pairs), plan=ctypes.addressof(plan.blocks), sums=_at(sums), text=_at(text),
    )  # fmt: skip
    if held is not None:
        call.pages, call.pages_row, call.page = held.table.data_ptr(), held.table.stride(0), held.size
        call.lengths = held.lengths.data_ptr()
    if visual is not None:
        visual = visual if visual.stride(-1) == 1 else visual.contiguous()
        call.visual, call.visual_batch = visual.data_ptr(), visual.stride(0)
    if seen is not None:
        call.mask, call.mask_batch, call.mask_row = seen.data_ptr(), seen.stride(0), seen.stride(1)
    call_library.mha2mla_decode_rotated(ctypes.byref(call))
    return _sums(sums.to(queries.rope.dtype), text.to(queries.rope.dtype), stored)


def _latent(stored: Rebuilt) -> tuple[torch.Tensor, torch.dtype, LatentBits | None]:
    """Latents `[B, S, r]` or bytes `[B, S, b]`, or those of all pages, which rows begin with; the dtype that
    they are of, and the bits of bytes.
    """
    held = stored.stored
    if isinstance(held, PackedTokens):
        return held.rows, held.dtype, held.bits
    if isinstance(held, Paged):
        if held.packed is None:
            return held.pages, held.pages.dtype, None
        return held.pages.view(torch.uint8), held.pages.dtype, held.packed.bits
    latent = stored.latents()
    return latent, latent.dtype, None


def _at(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _rows_of(mask: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """What each new token sees, `[B, T, S]`."""
    if mask is None:
        return None
    rows = (mask[:, 0] if mask.ndim == 4 else mask).contiguous()
    return rows.expand(batch, -1, -1)


def _up_of(up: Up) -> _Up:
    """Where the rows and biases of rotated keys lie."""
    rows, rank = up.weight.shape
    each = rows // up.kv_heads
    return _Up(up.weight.data_ptr(), _at(up.bias), each * rank, each)


def _sums(sums: torch.Tensor, text: torch.Tensor, stored: Rebuilt) -> Sums:
    """The same, None where a modality has no tokens."""
    if len(sums) == 1:
        return Sums((sums[0],), None)
    kinds = {kind for _, _, kind in stored.runs}
    has = [bool(kinds - {absent}) for absent in (Kind.VISION, Kind.TEXT)]
    latent = tuple(x if there else None for x, there in zip(sums, has, strict=True))
    return Sums(latent, text if all(has) else None)


def _plan(queries: Queries, stored: Rebuilt) -> _Plan:
    """The plan of the step's tokens, made by the first layer that needs it."""
    angles = stored.angles
    plans = angles.plans
    blocks = planned(queries, stored, WIDTH)
    key = plan_key(queries, stored, "laid out")
    if key not in plans:
        plans[key] = _laid_out(blocks or made_blocks(stored.runs, angles.pairs, WIDTH), stored)
    plan: _Plan = plans[key]
    return plan


def _tables(blocks: Sequence[Blocks], stored: Rebuilt, made: torch.Tensor) -> Tables:
    """Tables `[B, pairs, S and a tile]` of the pairs `made` of latents, of the tokens of which some are."""
    angles, rotation = stored.angles, stored.angles.rotation
    spans = [some.tokens.flatten() for some in blocks if some.rebuilt]
    if rotation is None or not spans:
        known, tokens = (angles.cos, angles.sin) if spans else (), slice(None, stored.length)
        found = tuple(table[:, tokens][..., made] for table in known)  # pages have room for more
    else:
        tokens = torch.cat(spans)
        found = rotation.of_pairs(tokens, made)
    laid_out = []
    for table in found:
        by_pair = torch.zeros(len(table), len(made), stored.length + TILE)  # read up to whole tiles
        by_pair[..., tokens] = table.transpose(1, 2).float()
        laid_out.append(by_pair)
    return (laid_out[0], laid_out[1]) if laid_out else (torch.zeros(1, 1, 1),) * 2


def _laid_out(blocks: Sequence[Blocks], stored: Rebuilt) -> _Plan:
    angles = stored.angles
    kept: list[torch.Tensor] = []
    made = angles.pairs[:, : max(some.rebuilt for some in blocks)].unique()
    cos, sin = _tables(blocks, stored, made)

    def keep(x: torch.Tensor | None, dtype: torch.dtype) -> int | None:
        if x is None:
            return None
        kept.append(x.to(dtype).contiguous())
        return kept[-1].data_ptr()

    laid = (_Blocks * len(blocks))()
    for some, to in zip(blocks, laid, strict=True):
        to.kind, to.made, to.terms, (to.count, to.width) = (
            some.kind,
            some.rebuilt,
            len(some.terms),
            some.tokens.shape,
        )
        to.start, to.stop = keep(some.tokens[:, 0], torch.int32), keep(some.tokens[:, -1] + 1, torch.int32)
        to.axes = keep(some.axes, torch.int32)
        if some.nodes is not None:
            to.nodes = some.nodes[0].shape[2]
            to.cos, to.sin = (keep(table, torch.float32) for table in some.nodes)
            to.basis = keep(some.basis, torch.float32)
            to.axis, to.node = (keep(x, torch.int32) for x in torch.tensor(some.terms).unbind(1))
    pairs = torch.searchsorted(made, angles.pairs.contiguous(), out_int32=True)
    return _Plan(blocks=laid, cos=cos, sin=sin, pairs=pairs, tensors=tuple(kept))
