"""Which layer gets how many rope and latent dims of one cache budget. Pure functions.

Sizes are counted in units of dims per KV head, the same for rope dims (R) and latent dims (d_kv):
both cost as much in the cache. A layer's sizes are `(rope units, latent units)`.
"""

import math
from collections.abc import Mapping, Sequence

Sizes = tuple[int, int]
Curve = Mapping[int, float]  # units -> loss
FLOOR = 1e-6  # losses below this are noise


def unit_dims(head_dim: int) -> int:
    """Dims per unit: a sixteenth of the head dim, made even, for rope dims come in pairs."""
    return max(2, head_dim // 32 * 2)


def interpolate(measured: Curve, up_to: int) -> dict[int, float]:
    """Losses at 1 to `up_to` units from those measured, never rising with size, linear in the logarithm.

    Below the least measured size the curve continues as between its first two points; above the
    largest it stays.
    """
    points, best = [], math.inf
    for units in sorted(measured):
        best = min(best, max(measured[units], FLOOR))
        points.append((units, math.log(best)))
    losses = {}
    for units in range(1, up_to + 1):
        after = next((i for i, (x, _) in enumerate(points) if x >= units), None)
        if after is None:
            losses[units] = math.exp(points[-1][1])
            continue
        (x0, y0), (x1, y1) = points[max(after - 1, 0)], points[max(after, min(1, len(points) - 1))]
        slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 0.0
        losses[units] = math.exp(y0 + slope * (units - x0))
    return losses


def allocate(rope: Sequence[Curve], latent: Sequence[Curve], budget: int) -> list[Sizes]:
    """Sizes of every layer, of least summed loss, that together take at most `budget` units.

    `rope[i]` and `latent[i]` give layer i's loss by units; a layer costs the sum of its two. Exact,
    by dynamic programming over the budget. Raises `ValueError` if not even the least sizes fit.
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for curve in (curve for pair in zip(rope, latent, strict=True) for curve in pair):
        after: dict[int, tuple[float, list[int]]] = {}
        for spent, (loss, chosen) in best.items():
            for units, extra in curve.items():
                total = spent + units
                if total <= budget and (total not in after or loss + extra < after[total][0]):
                    after[total] = (loss + extra, [*chosen, units])
        best = after
    if not best:
        raise ValueError(f"{budget} units do not hold the least sizes of {len(rope)} layers")
    _, flat = min(best.values(), key=lambda entry: (entry[0], sum(entry[1])))
    return list(zip(flat[::2], flat[1::2], strict=True))
