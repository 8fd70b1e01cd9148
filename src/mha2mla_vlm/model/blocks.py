"""Blocks of tokens within which most frequency pairs hardly turn, for keys that are rotated at read.

Over the tokens of a block, the angle of a pair moves by its frequency times the block's extent along its
axis. Within an image of multimodal RoPE that is nothing for the temporal pairs and little for the others.
Where it is small, `cos` and `sin` follow from their values at a few places ("nodes", of Chebyshev) by
interpolation: a score is then a weighted sum of products of the latent with the query turned to each node,
and no key is made. Pairs that turn too far are made of latents, as `rebuilt.py` does. A plan chooses, for
each block, from which pair on interpolation is less arithmetic. Pure functions over tensors.

Shapes: A axes, B batch, S all tokens, G KV heads, H query heads, T new tokens, R rope dims, C = R / 2 pairs
of a head in their order, n blocks of W tokens, K nodes, J terms.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mha2mla_vlm.model.modality import Kind, Run
from mha2mla_vlm.model.positions import Rotation, Tables

WIDTHS = (64, 256)  # tokens of a block where each query head has its KV head, and where some share one
CHUNK = 4096  # tokens whose blocks are worked on at a time
MOST_NODES = 20
CHOICES = 16  # numbers of pairs to be made of latents that a plan looks at


@dataclass(frozen=True)
class Blocks:
    """Some blocks of one modality: `tokens [n, W]`, the last one repeated where a block is not full.

    The first `rebuilt` pairs are made of latents. `nodes` are the tables of the others, `[B, n, K, G, C]`. A
    score is the sum over terms of `basis [B, n, J, W]` times a product with the query turned to the first
    node (`terms[0]`), or with the difference between another node and the first along one `(axis, node)`;
    `axes [G, C]` are those of the pairs. Without terms all pairs are made.
    """

    kind: Kind
    tokens: torch.Tensor
    rebuilt: int
    terms: tuple[tuple[int, int], ...]
    axes: torch.Tensor
    nodes: Tables | None = None
    basis: torch.Tensor | None = None


@dataclass(frozen=True)
class _Extent:
    """Where blocks of `tokens [n, W]` are: middle and half of their positions by axis, `[A, B, n]`."""

    tokens: torch.Tensor
    middle: torch.Tensor
    half: torch.Tensor

    def of(self, some: Sequence[int]) -> "_Extent":
        return _Extent(self.tokens[some], self.middle[..., some], self.half[..., some])


def _extent(rotation: Rotation, spans: Sequence[tuple[int, int, Kind]], width: int) -> _Extent:
    """That of blocks from one token to before another."""
    device = rotation.positions.device
    places = torch.tensor([[a, b - 1] for a, b, _ in spans], device=device)
    tokens = torch.minimum(places[:, :1] + torch.arange(width, device=device), places[:, 1:])
    where = rotation.positions[..., tokens].float()
    low, high = where.amin(-1), where.amax(-1)
    return _Extent(tokens, (low + high) / 2, (high - low) / 2)


def plan_blocks(
    rotation: Rotation,
    pairs: torch.Tensor,
    runs: Sequence[Run],
    rows: int,
    tolerance: float,
    width: int | None = None,
) -> tuple[Blocks, ...] | None:
    """The blocks of all tokens, for `rows` queries (H * T) and the kept `pairs [G, C]`.

    `tolerance` is the largest error of a turn by interpolation. None where no pair is worth it, and where
    modalities are mixed. Waits for the device once. A kernel that works block by block gives their `width`:
    then only blocks that need the same are put together, and however many, and blocks may be mixed.
    """
    if width is None and any(kind == Kind.MIXED for _, _, kind in runs):
        return None
    own = width or WIDTHS[rows > len(pairs)]
    spans = [(a, min(a + own, stop), kind) for start, stop, kind in runs for a in range(start, stop, own)]
    extent = _extent(rotation, spans, own)
    sizes = torch.tensor([b - a if width else own for a, b, _ in spans], device=pairs.device)
    angles, axes = (x[pairs] for x in rotation.frequencies)
    chosen, nodes = _choose(extent.half.amax(1), angles, axes, rows, sizes, tolerance)
    if min(chosen) == pairs.shape[1]:
        return None
    groups: dict[tuple[Kind, int, tuple[int, ...]], list[int]] = {}
    for block, (_, _, kind) in enumerate(spans):
        exact = tuple(axis[block] for axis in nodes) if width else ()
        groups.setdefault((kind, chosen[block], exact), []).append(block)
    few = len(spans) if width else max(1, CHUNK // own)
    made = []
    for (kind, rebuilt, _), blocks in groups.items():
        for some in (blocks[i : i + few] for i in range(0, len(blocks), few)):
            counts = [max(axis[block] for block in some) for axis in nodes]
            made.append(_blocks(rotation, extent.of(some), kind, pairs, axes, rebuilt, counts))
    return tuple(made)


def made_blocks(runs: Sequence[Run], pairs: torch.Tensor, width: int) -> tuple[Blocks, ...]:
    """Blocks of all tokens, of which all pairs are made of latents."""
    made = []
    for start, stop, kind in runs:
        tokens = torch.arange(start, start + -(-(stop - start) // width) * width).clamp(max=stop - 1)
        rebuilt, axes = pairs.shape[1], pairs[:, :0]
        made.append(Blocks(kind, tokens.to(pairs.device).unflatten(0, (-1, width)), rebuilt, (), axes))
    return tuple(made)


def _choose(
    half: torch.Tensor,
    angles: torch.Tensor,
    axes: torch.Tensor,
    rows: int,
    sizes: torch.Tensor,
    tolerance: float,
) -> tuple[list[int], list[list[int]]]:
    """How many pairs of each block to make of latents, and how many nodes the others then need by axis,
    for the least products of `r` numbers: of `half [A, n]`, `sizes [n]` in tokens, and the `angles, axes
    [G, C]` of kept pairs.
    """
    kv_heads, pairs = angles.shape
    step = max(1, pairs // CHOICES)
    made = torch.arange(0, pairs + step, step, device=half.device).clamp(max=pairs)
    fastest = torch.stack([angles.where(axes == axis, 0.0).amax(0) for axis in range(len(half))])
    fastest = fastest.flip(-1).cummax(-1).values.flip(-1)  # of the pairs from one on
    fastest = torch.nn.functional.pad(fastest, (0, 1))[:, made]
    limits = [2 * (tolerance * math.factorial(k) / 2) ** (1 / k) for k in range(1, MOST_NODES + 1)]
    bounds = torch.tensor(limits, device=half.device)
    nodes = torch.bucketize(fastest[:, :, None] * half[:, None], bounds) + 1  # [A, choices, n]
    absorbed = (pairs - made)[:, None]
    terms = (1 + (nodes - 1).sum(0)) * (absorbed > 0)
    cost = 2.0 * kv_heads * made[:, None] + terms * rows * (1 + 2 * absorbed / sizes)
    cost = cost.masked_fill((nodes > MOST_NODES).any(0), torch.inf)
    best = cost.argmin(0)
    kept = nodes[:, best, torch.arange(len(best), device=best.device)]
    first, *others = torch.cat([made[best][None], kept]).tolist()
    return first, others


def _blocks(
    rotation: Rotation,
    extent: _Extent,
    kind: Kind,
    pairs: torch.Tensor,
    axes: torch.Tensor,
    rebuilt: int,
    counts: Sequence[int],
) -> Blocks:
    """Blocks that make the same number of pairs, with `counts` of nodes along the axes."""
    if rebuilt == pairs.shape[1]:
        return Blocks(kind, extent.tokens, rebuilt, (), axes)
    terms = [(0, 0)] + [(axis, node) for axis, count in enumerate(counts) for node in range(1, count)]
    inner = torch.stack([_nodes(count, max(counts), extent.half) for count in counts])  # [A, K]
    places = extent.middle[..., None] + extent.half[..., None] * inner[:, None, None]  # [A, B, n, K]
    tables = rotation.at(places.flatten(2))
    kept = pairs[:, rebuilt:]
    cos, sin = (table.unflatten(1, places.shape[2:])[..., kept] for table in tables)
    where = rotation.positions[..., extent.tokens].float()
    within = (where - extent.middle[..., None]) / extent.half[..., None].clamp(min=0.5)  # [A, B, n, W]
    basis = [torch.ones_like(within[0])]
    basis += [_lagrange(within[axis], inner[axis, : counts[axis]], node) for axis, node in terms[1:]]
    return Blocks(
        kind,
        extent.tokens,
        rebuilt,
        tuple(terms),
        axes[:, rebuilt:],
        (cos, sin),
        torch.stack(basis, dim=2),
    )


def _nodes(count: int, room: int, like: torch.Tensor) -> torch.Tensor:
    """Chebyshev nodes in [-1, 1], the last repeated to fill the room."""
    places = [math.cos(math.pi * (2 * i + 1) / (2 * count)) if count > 1 else 0.0 for i in range(count)]
    return like.new_tensor(places + places[-1:] * (room - count))


def _lagrange(x: torch.Tensor, nodes: torch.Tensor, which: int) -> torch.Tensor:
    """The polynomial that is 1 at one node and 0 at the others."""
    others = torch.cat([nodes[:which], nodes[which + 1 :]])
    return ((x[..., None] - others) / (nodes[which] - others)).prod(-1)
