"""Which layer gets how many rope and latent dims of one cache budget. Pure functions.

Sizes are counted in units of dims per KV head, the same for rope dims (R) and latent dims (d_kv):
both cost as much in the cache. A layer's sizes are `(rope units, latent units)`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Sizes = tuple[int, int]
Curve = Mapping[int, float]  # units -> loss
FLOOR = 1e-6  # losses below this are noise
STATES = 2**17  # of what is spent, in units and in steps of work, that `choose` tells apart


class Option(NamedTuple):
    """A way to convert a layer: the units and the work that it takes, and the loss that it costs."""

    units: int
    work: float
    loss: float


Counted = tuple[int, int, float]  # the same, with the work in steps


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


def choose(options: Sequence[Sequence[Option]], budget: int, most_work: float) -> list[int]:
    """The number of one of each layer's options, of least summed loss, that together take at most `budget`
    units and at most `most_work`.

    By dynamic programming. Exact if the limit of work makes no difference; else the work beyond each layer's
    least is counted in steps, rounded up, of which there are many. Of equal losses the smaller sizes are
    taken. Raises `ValueError` if nothing is within both.
    """
    most_work *= 1 + 1e-9
    chosen = _chosen(options, budget)
    if _work(options, chosen) <= most_work:
        return chosen
    least = _of_least_work(options, budget)
    if (work := _work(options, least)) > most_work:
        raise ValueError(f"the least work in {budget} units is {work:g}")
    spare = most_work - sum(min(option.work for option in layer) for layer in options)
    counted = [_in_steps(layer, spare, STATES // (budget + 1)) for layer in options]
    return _dynamic(counted, budget, STATES // (budget + 1)) or least


def least_work(options: Sequence[Sequence[Option]], budget: int) -> float:
    """The least that options within the budget take; raises `ValueError` if none are."""
    return _work(options, _of_least_work(options, budget))


def _work(options: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return sum(layer[number].work for layer, number in zip(options, chosen, strict=True))


def _of_least_work(options: Sequence[Sequence[Option]], budget: int) -> list[int]:
    return _chosen([[option._replace(loss=option.work) for option in layer] for layer in options], budget)


def _chosen(options: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Those of least loss, whatever the work."""
    found = _dynamic([[(option.units, 0, option.loss) for option in layer] for layer in options], budget, 0)
    if found is None:
        raise ValueError(f"{budget} units do not hold the least sizes of {len(options)} layers")
    return found


def _in_steps(layer: Sequence[Option], spare: float, steps: int) -> list[Counted]:
    """Options with their work beyond the least in steps, of which `steps` are `spare`; more if it is more."""
    least, found = min(option.work for option in layer), []
    for option in layer:
        more = option.work - least
        count = 0 if more <= 0 else steps + 1 if more > spare else math.ceil(more / spare * steps)
        found.append((option.units, count, option.loss))
    return found


def _dynamic(options: Sequence[Sequence[Counted]], budget: int, steps: int) -> list[int] | None:
    """Those of least loss within the units and the steps; None if there are none."""
    losses = np.full((budget + 1, steps + 1), np.inf)  # by what is spent
    losses[0, 0] = 0.0
    choices = []
    for layer in options:
        after, choice = np.full_like(losses, np.inf), np.zeros(losses.shape, dtype=np.int32)
        for number in _not_beaten(layer):
            units, more, loss = layer[number]
            if units <= budget and more <= steps:
                tried = losses[: budget + 1 - units, : steps + 1 - more] + loss
                better = tried < after[units:, more:]
                np.copyto(after[units:, more:], tried, where=better)
                np.copyto(choice[units:, more:], number, where=better)
        losses = after
        choices.append(choice)
    units, more = (int(n) for n in np.unravel_index(losses.argmin(), losses.shape))  # the first: least units
    if losses[units, more] == np.inf:
        return None
    chosen: list[int] = []
    for layer, choice in zip(reversed(options), reversed(choices), strict=True):
        chosen.insert(0, int(choice[units, more]))
        units, more = units - layer[chosen[0]][0], more - layer[chosen[0]][1]
    return chosen


def _not_beaten(layer: Sequence[Counted]) -> list[int]:
    """Numbers of the options to which no other is at least equal in all."""
    kept: list[int] = []
    for number in sorted(range(len(layer)), key=lambda number: layer[number]):
        _, more, loss = layer[number]
        if not any(layer[other][1] <= more and layer[other][2] <= loss for other in kept):
            kept.append(number)
    return kept
