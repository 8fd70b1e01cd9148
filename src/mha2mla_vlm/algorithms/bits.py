"""Bits of each latent channel: the more, the more its error costs. Pure functions.

A channel is kept as a float16 or as an integer of 8, 4 or 2 bits, or not at all.

Channels of a PCA are uncorrelated and in the order of what they carry, as transform coding wants them: an
error e of channel j costs `w_j E[e^2]`, and the best numbers of bits follow from the channels' importances
`w_j E[c_j^2]` only (reverse water-filling, Cover and Thomas, section 10.3). Steps are fixed by calibration
and moved into the factors, so that a latent counts in steps and a row of integers is read without any other.

Shapes: C hidden, G KV heads, R rope dims, r latent dims.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

import torch

from mha2mla_vlm.algorithms.factorization.base import Outputs
from mha2mla_vlm.algorithms.factorization.low_rank import Factors, Latents, in_blocks, metric_roots
from mha2mla_vlm.algorithms.token_stats import TokenStats
from mha2mla_vlm.config import CHANNEL_BITS, LatentBits

STEPS = {16: 1.0, 8: 1 / 16, 4: 0.4, 2: 1.0}  # of a channel's standard deviation
ERRORS = {16: 1e-6, 8: 3.3e-4, 4: 0.0138, 2: 0.12}  # of the variance of normal numbers, rounded to such steps
KEY_STEP = 1 / 12  # of rotated keys
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
    """How many channels of falling `importance [r]` to keep in 16, 8, 4 and 2 bits in `row_bytes`, for the
    least error. Raises `ValueError` if not even four channels fit.
    """
    channels, weight = len(importance), importance.double()
    cut_off = torch.cat([weight.new_zeros(1), weight.cumsum(0)])  # what the first channels carry
    step = max(1, math.ceil(channels / CHOICES / 4)) * 4
    most = min(channels, row_bytes // 2)
    few = sorted({min(count, most) for power in range(0, 12) for count in (0, 2**power, 3 * 2**power // 2)})
    sixteen, eight, four = torch.meshgrid(
        torch.tensor(few),
        torch.arange(0, min(channels, row_bytes) + 1, 1 if step == 4 else step),
        torch.arange(0, channels + 1, step),
        indexing="ij",
    )
    left = row_bytes - 2 * sixteen - eight - four // 2
    two = torch.minimum(left, (channels - sixteen - eight - four) // 4) * 4
    kept = torch.stack([sixteen, eight, four, two.clamp(min=0)])
    fits = (two >= 0) & (kept.sum(0) > 0)
    carried = cut_off[kept.cumsum(0).clamp(max=channels)]
    shares = carried.diff(dim=0, prepend=torch.zeros_like(carried[:1]))
    errors = torch.tensor([ERRORS[each] for each in CHANNEL_BITS], dtype=weight.dtype)
    lost = torch.einsum("b,b...->...", errors, shares) - carried[-1]
    lost = lost.masked_fill(~fits, math.inf)
    if not bool(fits.any()):
        raise ValueError(f"{row_bytes} bytes hold no channels")
    return LatentBits(*kept.flatten(1)[:, int(lost.argmin())].tolist())


def in_steps(factors: Factors, bits: LatentBits) -> Factors:
    """Factors of the first channels, of `with_latents`, whose latents count in steps about their mean."""
    assert factors.latents is not None, "made by with_latents"
    some, (mean, spread, _) = factors.of_rank(bits.rank), factors.latents
    sizes = torch.cat([spread.new_full((count,), STEPS[each]) for each, count in bits.by_bits()])
    # a channel that never moves is its mean
    step = spread[: bits.rank].clamp_min(1e-6 * float(spread.max())) * sizes
    return replace(some, down=some.down / step[:, None], up=some.up * step, offset=-mean[: bits.rank] / step)


def key_steps(weight: torch.Tensor, bias: torch.Tensor | None, tokens: TokenStats) -> torch.Tensor:
    """Steps of rotated keys `[G, R / 2]`, one for each pair of dims `(i, i + R / 2)`, which RoPE turns, of
    `weight [G, R, C]` and `bias [G, R]` that give these keys before RoPE.
    """
    rows, inputs = weight.double(), tokens.moment / tokens.mass
    squares = torch.einsum("grc,cd,grd->gr", rows, inputs, rows)
    if bias is not None:
        squares = squares + 2 * bias.double() * (rows @ tokens.mean) + bias.double().square()
    spread = squares.unflatten(1, (2, -1)).mean(1).clamp_min(0).sqrt()
    return (KEY_STEP * spread).clamp_min(torch.finfo(torch.float32).tiny)
