"""What partial RoPE loses, and folding: the mean rotation of a dropped pair, moved into the weights.

A dropped pair with query components (q1, q2) and key components (k1, k2) gave the logit a rotated
part x. Unrotated it gives u = q1 k1 + q2 k2, and w = q1 k2 - q2 k1 is there to be had as well: keys
(a k1 + b k2, a k2 - b k1) give a u + b w. Folding takes the a and b of least squares. Pure functions.

Shapes: T tokens, t queries looked at, H query heads, G KV heads, D head dim, P = D / 2 pairs. The
features of a query and a key are `[x | u | w]`, P each.
"""

import torch

from mha2mla_vlm.algorithms.at_once import rows_at_once
from mha2mla_vlm.algorithms.looked_at import Chosen, unseen_by

RIDGE = 1e-4  # of each feature's variance


def pair_covariance(
    queries: torch.Tensor,
    keys: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    chosen: Chosen,
    scaling: float,
    unseen: torch.Tensor | None = None,
) -> torch.Tensor:
    """Covariance of the features under causal attention, `[G, 3 P, 3 P]` in float64.

    `queries [H, T, D]` and `keys [G, T, D]` are not rotated, `cos, sin [T, P]`; `chosen` are the queries to
    look at; `unseen [T, T]` are tokens that each query does not see, by default those after it. Each query's
    keys are weighted by its attention and centred, for softmax ignores constants; the sum is over queries
    and the group's heads. Half of the variance of an error is the KL divergence in the attention, to second
    order.
    """
    kv_heads, total, dim = keys.shape
    turn = torch.complex(cos, sin)  # a rotary table may scale, too, so this is not of length 1
    size = 3 * dim // 2
    covariance = torch.zeros(kv_heads, size, size, dtype=torch.float64, device=keys.device)
    block = rows_at_once(total * size, keys.device)
    later = [unseen_by(rows, total, unseen) for rows, _ in chosen]
    for group, key in enumerate(_complex(keys)):
        turned_key, sharing = key * turn, queries.unflatten(0, (kv_heads, -1))[group]
        for head, (rows, weights), hidden in zip(sharing, chosen, later, strict=True):
            query = _complex(head[rows]) * scaling
            turned = query * turn[rows]
            logits = (turned @ turned_key.conj().T).real
            attention = logits.masked_fill(hidden, -torch.inf).softmax(-1)
            root = (attention * weights[:, None]).sqrt()
            for start in range(0, len(rows), block):
                some = slice(start, start + block)
                plain = query[some].conj()[:, None] * key  # u + i w, [queries, T, P]
                rotated = (turned[some].conj()[:, None] * turned_key).real
                features = torch.cat([rotated, plain.real, plain.imag], dim=-1)
                features -= attention[some, None] @ features  # their mean
                features *= root[some, :, None]
                spread = features.flatten(0, 1)
                covariance[group] += (spread.T @ spread).double()
    return covariance


def _complex(x: torch.Tensor) -> torch.Tensor:
    """Pairs of `[.., D]` as complex numbers `[.., P]`."""
    return torch.view_as_complex(torch.stack(x.float().chunk(2, -1), -1))


def drop_order(covariance: torch.Tensor, *, fold: bool) -> torch.Tensor:
    """Pairs of each KV head in the order in which dropping them costs least: `[G, P]`.

    Greedy: each time the pair goes that, with all that went before, leaves the least variance in
    the logits after the best fold (or, without `fold`, unrotated). Pairs interact, so this differs
    from scores of single pairs. The last R/2 of the order are the pairs to keep.
    """
    state, regressors = _regression(covariance, fold)
    pairs = len(regressors)
    head = torch.arange(len(state), device=state.device)
    dropped = torch.zeros(len(state), pairs, dtype=torch.bool, device=state.device)
    order = []
    for _ in range(pairs):
        chosen = _left_after(state, regressors).masked_fill(dropped, torch.inf).argmin(-1)
        dropped[head, chosen] = True
        order.append(chosen)
        state = _drop(state, head, chosen, regressors[chosen])
    return torch.stack(order, dim=1)


def _regression(covariance: torch.Tensor, fold: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Covariance of [errors of the pairs | regressors | sum of the errors of dropped pairs], and each
    pair's regressors `[P, 2]`. The sum is nothing at first.

    Without folding a dropped pair's error is x - u, and nothing regresses it: `[P, 0]`.
    """
    pairs = covariance.shape[-1] // 3
    regressors = torch.arange(pairs, 3 * pairs, device=covariance.device).view(2, pairs).T
    if not fold:
        eye = torch.eye(pairs, dtype=covariance.dtype, device=covariance.device)
        error = torch.cat([eye, -eye, 0 * eye])
        covariance, regressors = error.T @ covariance @ error, regressors[:, :0]
    return torch.nn.functional.pad(covariance, (0, 1, 0, 1)), regressors


def _damped(variance: torch.Tensor) -> torch.Tensor:
    """Variances `[.., n, n]` of regressors with a small ridge, so that solving is safe."""
    diagonal = variance.diagonal(dim1=-2, dim2=-1)
    return variance + torch.diag_embed(RIDGE * diagonal + torch.finfo(torch.float32).tiny)


def _left_after(state: torch.Tensor, regressors: torch.Tensor) -> torch.Tensor:
    """Variance left if one more pair were dropped, for each: `[G, P]`."""
    pairs = torch.arange(len(regressors), device=state.device)
    left = state[:, -1:, -1] + 2 * state[:, -1, pairs] + state[:, pairs, pairs]
    with_error = state[:, -1, regressors] + state[:, pairs[:, None], regressors]
    variance = _damped(state[:, regressors[:, :, None], regressors[:, None, :]])
    solved = torch.linalg.solve(variance, with_error.unsqueeze(-1)).squeeze(-1)
    return left - (with_error * solved).sum(-1)


def _drop(
    state: torch.Tensor, head: torch.Tensor, chosen: torch.Tensor, regressors: torch.Tensor
) -> torch.Tensor:
    """The state with the `chosen [G]` pairs' errors in the sum, and everything regressed on theirs."""
    state = state.clone()
    state[:, -1] += state[head, chosen]
    state[:, :, -1] += state[head, :, chosen]
    given = state[head[:, None], :, regressors]  # [G, 2, 3 P + 1]
    variance = _damped(state[head[:, None, None], regressors[:, :, None], regressors[:, None, :]])
    return state - given.transpose(1, 2) @ torch.linalg.solve(variance, given)


def fold_coefficients(covariance: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """What the pairs that are not `kept [G, R/2]` fold to: a and b, `[G, 2, P]`.

    All dropped pairs of a head are solved together. Kept pairs have a = 1, b = 0.
    """
    pairs = covariance.shape[-1] // 3
    regressors = torch.arange(pairs, 3 * pairs, device=covariance.device).view(2, pairs)
    coefficients = torch.zeros(len(kept), 2, pairs, dtype=covariance.dtype, device=covariance.device)
    coefficients[:, 0] = 1.0
    for head, (matrix, chosen) in enumerate(zip(covariance, kept, strict=True)):
        gone = torch.ones(pairs, dtype=torch.bool, device=matrix.device)
        gone[chosen] = False
        index = regressors[:, gone].flatten()
        if len(index):
            with_error = matrix[:pairs][gone][:, index].sum(0)
            solved = torch.linalg.solve(_damped(matrix[index[:, None], index]), with_error)
            coefficients[head][:, gone] = solved.view(2, -1)
    return coefficients


def fold_keys(keys: torch.Tensor, fold: torch.Tensor, stride: int | None = None) -> torch.Tensor:
    """Key rows `[G, D, ..]` (weights or biases) folded by a and b `[G, 2, P]`; rounded once. Pair i is rows
    `(i, i + stride)`, by default P; what is in no pair, which the original does not rotate, stays.
    """
    a, b = (x.reshape(*x.shape, *[1] * (keys.ndim - 2)) for x in fold.unbind(1))
    pairs, stride = a.shape[1], stride or a.shape[1]
    first, second = (keys[:, i : i + pairs].to(fold.dtype) for i in (0, stride))
    folded = keys.clone()
    folded[:, :pairs] = (a * first + b * second).to(keys.dtype)
    folded[:, stride : stride + pairs] = (a * second - b * first).to(keys.dtype)
    return folded
