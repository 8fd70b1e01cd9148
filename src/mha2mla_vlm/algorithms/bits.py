"""Latent channels as integers of 8, 4 and 2 bits, the more the more their error costs. Pure functions.

Channels of a PCA are uncorrelated and in the order of what they carry, as transform coding wants them: an
error e of channel j costs `w_j E[e^2]`, and the best numbers of bits follow from the channels' importances
`w_j E[c_j^2]` alone (reverse water-filling, Cover and Thomas, section 10.3). Steps are fixed by calibration
and moved into the factors, so that a latent counts in steps and a row of integers is complete in itself.

Shapes: r latent dims.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

import torch

from mha2mla_vlm.algorithms.factorization.base import Outputs
from mha2mla_vlm.algorithms.factorization.low_rank import Factors, Latents, in_blocks, metric_roots
from mha2mla_vlm.algorithms.token_stats import TokenStats
from mha2mla_vlm.config import LatentBits

STEPS = {8: 1 / 16, 4: 0.4, 2: 1.0}  # of a channel's standard deviation
ERRORS = {8: 3.3e-4, 4: 0.0138, 2: 0.12}  # of the variance of normal numbers, rounded to such steps
CHOICES = 256  # numbers of channels of 8 bits, and of 4, that are looked at


def with_latents(factors: Factors, outputs: Outputs, tokens: TokenStats) -> Factors:
    """Factors with what their latents are for these tokens, the most important channels first.

    Importance is a channel's variance times what its error costs, in the metric of the tokens if they have
    one, else in that of keys and values.
    """
    down, centered = factors.down.double(), tokens.centered()
    variance = ((down @ (centered.moment / tokens.mass)) * down).sum(1).clamp_min(0)
    roots = []
    if tokens.metric is not None:
        roots = metric_roots(tokens.metric, outputs.key_dims, turned=outputs.turned)
    seen = in_blocks(roots, factors.up.double(), lambda root, rows: root.T @ rows)
    importance = variance * seen.square().sum(0)
    latents = Latents(down @ tokens.mean, variance.sqrt(), importance)
    return replace(factors, latents=latents).take(importance.argsort(descending=True))


def importance(factors: Iterable[Factors]) -> torch.Tensor:
    """What losing each channel `[r]` of a layer costs, over its modalities, by factors of `with_latents`."""
    return torch.stack([factor.latents.importance for factor in factors if factor.latents]).sum(0)


def best_bits(importance: torch.Tensor, row_bytes: int) -> LatentBits:
    """How many channels of falling `importance [r]` to keep in 8, 4 and 2 bits in `row_bytes`, for the least
    error. Raises `ValueError` if not even four channels fit.
    """
    weight = importance.double()
    channels = len(weight)
    tails = torch.cat([weight.flip(0).cumsum(0).flip(0), weight.new_zeros(1)])  # of the channels from one on
    step = max(1, math.ceil(channels / CHOICES / 4)) * 4
    eight = torch.arange(0, min(channels, row_bytes) + 1, 1 if step == 4 else step)[:, None]
    four = torch.arange(0, channels + 1, step)[None]
    two = ((row_bytes - eight - four // 2) * 4).clamp(max=channels // 4 * 4)
    fits = (two >= 0) & (eight + four <= channels) & (eight + four + two > 0)
    two = torch.minimum(two, (channels - eight - four) // 4 * 4).clamp(min=0)
    cut = [x.clamp(0, channels) for x in (eight, eight + four, eight + four + two)]
    a, b, c = (tails[x] for x in torch.broadcast_tensors(*cut))
    error = (tails[0] - a) * ERRORS[8] + (a - b) * ERRORS[4] + (b - c) * ERRORS[2] + c
    error = error.masked_fill(~fits, math.inf)
    best = int(error.argmin())
    if math.isinf(float(error.flatten()[best])):
        raise ValueError(f"{row_bytes} bytes hold no channels")
    at = divmod(best, error.shape[1])
    return LatentBits(int(eight[at[0], 0]), int(four[0, at[1]]), int(two[at]))


def in_steps(factors: Factors, bits: LatentBits) -> Factors:
    """Factors of the first channels, of `with_latents`, whose latents count in steps about their mean."""
    assert factors.latents is not None, "made by with_latents"
    some, (mean, spread, _) = factors.of_rank(bits.rank), factors.latents
    sizes = torch.cat([spread.new_full((count,), STEPS[each]) for each, count in bits.by_bits()])
    # a channel that never moves is its mean
    step = spread[: bits.rank].clamp_min(1e-6 * float(spread.max())) * sizes
    return replace(some, down=some.down / step[:, None], up=some.up * step, offset=-mean[: bits.rank] / step)


def rounded(latent: torch.Tensor, bits: LatentBits) -> torch.Tensor:
    """Latents `[.., r]` in steps, as they are after they were kept in `bits`: the middles of steps.

    Gradients pass as if nothing were rounded (straight-through), but not where numbers are out of range.
    """
    parts = zip(bits.by_bits(), latent.split(bits.counts, dim=-1), strict=True)
    limits = [(part, 2 ** (each - 1) - 0.5) for (each, _), part in parts]
    inside = torch.cat([part.clamp(-limit, limit) for part, limit in limits], dim=-1)
    found = torch.cat([(part.floor() + 0.5).clamp(-limit, limit) for part, limit in limits], dim=-1)
    if torch.is_grad_enabled() and latent.requires_grad:
        return inside + (found - inside).detach()
    return found
