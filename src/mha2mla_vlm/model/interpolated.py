"""Absorbed attention over keys that are rotated when they are read, by the plan of `blocks.py`.

Shapes: those of `blocks.py`; M = H / G, Q = H * T rows, r latent dims, D head dim.
"""

from collections.abc import Hashable, Sequence

import torch

from mha2mla_vlm.model.absorbed import Queries, Sums, Up, attend_pieces, attend_scored
from mha2mla_vlm.model.blocks import Blocks, plan_blocks
from mha2mla_vlm.model.rebuilt import BLOCK, Angles, Rebuilt
from mha2mla_vlm.model.rope import rotate


def attend_rotated(
    queries: Queries, stored: Rebuilt, visual: torch.Tensor | None, mask: torch.Tensor | None
) -> Sums:
    """Attention over all tokens, as `absorbed.attend_pieces` over pieces whose keys are made, if faster."""
    plan = planned(queries, stored)
    if plan is None:
        return attend_pieces(queries, stored, stored.runs, visual, mask)
    latent = stored.latents()
    scores = rotated_scores(queries.rope, latent, stored.ups, plan, stored.angles)
    return attend_scored(queries, scores, latent, stored.runs, visual, mask)


def planned(queries: Queries, stored: Rebuilt, width: int | None = None) -> tuple[Blocks, ...] | None:
    """The plan of the step's tokens, made by the first layer that needs it; see `plan_blocks`."""
    angles, rotation = stored.angles, stored.angles.rotation
    if rotation is None or stored.length <= BLOCK or torch.compiler.is_compiling():
        return None
    _, kv_heads, rows, _ = queries.rope.shape
    key = plan_key(queries, stored, width)
    if key not in rotation.plans:
        tolerance = max(torch.finfo(stored.ups[0].weight.dtype).eps / 8, 1e-5)
        given = (rotation, angles.pairs, stored.runs, kv_heads * rows, tolerance)
        rotation.plans[key] = plan_blocks(*given, width)
    plan: tuple[Blocks, ...] | None = rotation.plans[key]
    return plan


def plan_key(queries: Queries, stored: Rebuilt, *more: Hashable) -> Hashable:
    """What a plan depends on, among the layers of a step."""
    _, kv_heads, rows, rope_dim = queries.rope.shape
    # where all pairs are kept, they are the same in all layers
    pairs = None if rope_dim == stored.angles.dims else id(stored.angles.pairs)
    return (tuple(stored.runs), kv_heads * rows, pairs, *more)


def rotated_scores(
    queries: torch.Tensor, latent: torch.Tensor, ups: Sequence[Up], plan: Sequence[Blocks], angles: Angles
) -> torch.Tensor:
    """Scores `[B, Q, S]` of queries `[B, G, M*T, R]` against the rotated keys of `latent [B, S, r]`."""
    batch, kv_heads, rows, _ = queries.shape
    scores = queries.new_empty(batch, kv_heads * rows, latent.shape[1])
    for blocks in plan:
        up = ups[-1] if blocks.kind else ups[0]
        some = latent[:, blocks.tokens]
        parts = []
        if blocks.terms:
            parts.append(_interpolated(queries, some, up, blocks))
        if blocks.rebuilt:
            parts.append(_rebuilt(queries, some, up, blocks, angles))
        scores.index_copy_(2, blocks.tokens.flatten(), sum(parts).to(scores.dtype))
    return scores


def _interpolated(queries: torch.Tensor, latent: torch.Tensor, up: Up, blocks: Blocks) -> torch.Tensor:
    """Scores `[B, Q, n*W]` of the pairs that are not made, of `latent [B, n, W, r]`."""
    assert blocks.basis is not None, "blocks with terms have a basis"
    batch, count, width, rank = latent.shape
    turned = _turned(queries, blocks).to(queries.dtype)  # [G, B, n, J, M*T, 2C]
    columns = _columns(up.rope.shape[1] // 2, blocks.rebuilt, None, latent.device)
    rows = turned.flatten(1, 4)
    absorbed = (rows @ up.rope[:, columns]).unflatten(1, turned.shape[1:5])
    absorbed = absorbed.permute(1, 2, 3, 0, 4, 5).reshape(batch * count, -1, rank)
    scores = absorbed @ latent.flatten(0, 1).transpose(-1, -2)  # [B*n, J*Q, W]
    if up.rope_bias is not None:
        constant = (rows @ up.rope_bias[..., columns].transpose(-1, -2)).unflatten(1, turned.shape[1:5])
        scores += constant.permute(1, 2, 3, 0, 4, 5).reshape(batch * count, -1, 1)
    scores = scores.view(batch, count, len(blocks.terms), -1, width) * blocks.basis[:, :, :, None]
    return scores.sum(2).transpose(1, 2).flatten(2)


def _turned(queries: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Queries `[B, G, M*T, R]` turned back by the rotation of each term's node, `[G, B, n, J, M*T, 2C]`."""
    assert blocks.nodes is not None, "blocks with terms have nodes"
    half = queries.shape[-1] // 2
    a, b = (queries[:, None, None, :, :, i + blocks.rebuilt : i + half] for i in (0, half))
    cos, sin = (table[:, :, :, :, None] for table in blocks.nodes)
    nodes = torch.stack([a * cos + b * sin, b * cos - a * sin], dim=-2)  # [B, n, K, G, M*T, 2, C]
    first, *others = blocks.terms
    start = nodes[:, :, first[1]]
    turned = [start]
    for axis, node in others:
        own = (blocks.axes == axis)[:, None, None]
        turned.append((nodes[:, :, node] - start) * own)
    return torch.stack(turned, dim=2).permute(3, 0, 1, 2, 4, 5, 6).flatten(-2)


def _rebuilt(
    queries: torch.Tensor, latent: torch.Tensor, up: Up, blocks: Blocks, angles: Angles
) -> torch.Tensor:
    """Scores `[B, Q, n*W]` of the pairs that are made of `latent [B, n, W, r]`."""
    columns = _columns(up.rope.shape[1] // 2, 0, blocks.rebuilt, latent.device)
    keys = latent.flatten(1, 2)[:, None] @ up.rope[:, columns].transpose(-1, -2)
    if up.rope_bias is not None:
        keys = keys + up.rope_bias[..., columns]
    keys = rotate(keys, *angles.first(blocks.tokens.flatten(), blocks.rebuilt))
    return (queries[..., columns] @ keys.transpose(-1, -2)).flatten(1, 2)


def _columns(half: int, start: int, stop: int | None, device: torch.device) -> torch.Tensor:
    """The dims of some pairs, of which pair i is dims `(i, i + half)`."""
    first = torch.arange(half, device=device)[start:stop]
    return torch.cat([first, first + half])
