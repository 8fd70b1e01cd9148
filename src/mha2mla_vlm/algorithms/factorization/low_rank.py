"""Low-rank factors of keys and values. Pure functions over tensors, accumulated in float64.

Shapes: O = G * (N + D) outputs, per KV head N key rows and D value rows; r latent dims.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch

RIDGE = 1e-6  # of the mean variance, added to every input direction
METRIC_RIDGE = 1e-3  # of a direction's own and of the mean weight, added to every output direction


class Latents(NamedTuple):
    """Of each latent dim `[r]` its mean, its standard deviation, and what losing it costs."""

    mean: torch.Tensor
    spread: torch.Tensor
    importance: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Factors:
    """`up @ down` stands for a weight: `down [r, hidden]`, `up [O, r]`.

    Each latent dim has a row of `down` and a column of `up` of the same norm, as published: training
    takes steps of one size in both, which spoil a factor that is much smaller than the other.
    With the `mean [hidden]` input, and the outputs `[O]` that the weight gives for it, it stays exact.
    `spectrum` holds what all directions carry of the squared outputs, the largest first, `latents` what is
    known of each latent dim. An `offset [r]` is added to latents; the shift takes it off again.
    """

    down: torch.Tensor
    up: torch.Tensor
    mean: tuple[torch.Tensor, torch.Tensor] | None = None
    spectrum: torch.Tensor | None = None
    latents: Latents | None = None
    offset: torch.Tensor | None = None

    @property
    def shift(self) -> torch.Tensor | None:
        """What the mean input loses less what the offset adds, `[O]`, to be added to the outputs; None where
        there is neither.
        """
        found = None if self.mean is None else self.mean[1] - self.up @ (self.down @ self.mean[0])
        if self.offset is None:
            return found
        added = self.up @ self.offset
        return -added if found is None else found - added

    def of_rank(self, rank: int) -> Self:
        """Those of a smaller rank: of the PCA, the first directions."""
        return self.take(torch.arange(rank, device=self.down.device))

    def take(self, dims: torch.Tensor) -> Self:
        """Those of some latent dims, in this order."""
        latents = None if self.latents is None else Latents(*(part[dims] for part in self.latents))
        return replace(self, down=self.down[dims], up=self.up[:, dims], latents=latents)


def damped(moment: torch.Tensor) -> torch.Tensor:
    """A second moment with a small ridge, in float64.

    Directions that calibration never saw get a little weight, so that rank left over goes to what
    the weights would do with them instead of to noise.
    """
    moment = moment.double()
    ridge = RIDGE * moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return moment + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def shrunk(moment: torch.Tensor, share: float) -> torch.Tensor:
    """A second moment with `share` of its mean variance added in every direction, in float64.

    `S + share tr(S) / n I`: `pca_factors` then also minds what the weights do with inputs unlike those of
    calibration (Ledoit and Wolf 2004, with a share that is given instead of estimated).
    """
    moment = moment.double()
    ridge = share * moment.diagonal().mean()
    return moment + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def pca_factors(
    weight: torch.Tensor, moment: torch.Tensor, rank: int, roots: Sequence[torch.Tensor] = ()
) -> Factors:
    """Best rank-`rank` factors of `weight [O, hidden]` for inputs of second moment `[hidden, hidden]`.

    With P the top eigenvectors of `W S W^T`, `up = P` and `down = P^T W` minimise the squared error
    of the outputs `W x` summed over inputs. This is the whitened SVD of the paper (arXiv 2601.11464,
    section 3.2) without its inverse: any rank up to O works, whatever the rank of S.

    Their scale is then split evenly.

    Given the triangular `roots` of a metric, in blocks over outputs, an error e counts as the square of
    `root^T e`: the same PCA of `root^T W`, taken back on the up side.
    """
    weight = weight.double()
    seen = in_blocks(roots, weight, lambda root, rows: root.T @ rows)
    top, spectrum = _top_directions(seen, damped(moment), rank)
    up = in_blocks(roots, top, lambda root, rows: torch.linalg.solve_triangular(root.T, rows, upper=True))
    down = top.T @ seen
    norms, tiny = down.norm(dim=1), torch.finfo(torch.float32).tiny
    scale = (up.norm(dim=0) / norms.clamp_min(max(1e-6 * float(norms.max()), tiny))).sqrt().clamp_min(tiny)
    return Factors(down=down * scale[:, None], up=up / scale, spectrum=spectrum)


def about_mean(factors: Factors, weight: torch.Tensor, mean: torch.Tensor) -> Factors:
    """Factors of what differs from a `mean [hidden]` input, with what the weight gives for it."""
    return replace(factors, mean=(mean, weight.double() @ mean))


def _top_directions(
    weight: torch.Tensor, moment: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Top eigenvectors of `W S W^T`, `[O, rank]`, by the smaller of the problems on outputs and on inputs;
    and all eigenvalues that it has, the largest first.

    With `S = L L^T` they are `W L v` for those v of `L^T W^T W L`, up to length.
    """
    outputs, inputs = weight.shape
    if inputs < outputs and rank <= inputs:
        root, failed = torch.linalg.cholesky_ex(moment)
        if not failed:
            return _by_inputs(weight, root, rank)
    values, vectors = torch.linalg.eigh(weight @ moment @ weight.T)
    return vectors[:, -rank:].flip(-1), values.flip(-1)


def _by_inputs(weight: torch.Tensor, root: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh(root.T @ (weight.T @ weight) @ root)
    lengths = values[-rank:].flip(-1).clamp_min(0).sqrt()
    found = weight @ (root @ vectors[:, -rank:].flip(-1))
    known = lengths > 1e-7 * lengths[0]  # what is below is rounding, and of no use
    return torch.where(known, found / lengths.where(known, 1.0), 0.0), values.flip(-1)


def in_blocks(
    roots: Sequence[torch.Tensor],
    x: torch.Tensor,
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`x` with `function` of each of the `metric_roots` and its rows; as it is where there are none."""
    if not roots:
        return x
    return torch.cat(
        [function(root, rows) for root, rows in zip(roots, x.split([*map(len, roots)]), strict=True)]
    )


def metric_roots(
    metric: torch.Tensor, others: torch.Tensor, *, turned: int = 0, shrinkage: float = 0.0
) -> list[torch.Tensor]:
    """Lower triangular roots of a metric of errors, in blocks over outputs, damped so that no error is free.

    `metric [2, G, D, D]` is of plain keys and of values (`error_metric.attention_usage`), `others
    [G, N]` the key dims that are factorised. The first `turned` of these are keys before RoPE, and
    `metric[2]` is of them (`error_metric.key_metric`). With `shrinkage` every block gets that share of the
    mean weight of all output directions besides: the metric is drawn to one that takes all errors alike.
    """
    blocks = []
    for head, dims in enumerate(others):
        for which, part in ((-1, dims[:turned]), (0, dims[turned:])):
            blocks += [metric[which, head][part][:, part]] if len(part) else []
        blocks.append(metric[1, head])
    scale = torch.cat([block.diagonal() for block in blocks]).mean()
    ridges = (METRIC_RIDGE * (block.diagonal() + scale) + shrinkage * scale for block in blocks)
    pairs = zip(blocks, ridges, strict=True)
    return [torch.linalg.cholesky(block + torch.diag(ridge)) for block, ridge in pairs]
