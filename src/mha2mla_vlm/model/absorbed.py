"""Absorbed attention: over latents, without keys and values. Pure functions over tensors.

The key half of the up projection moves to the query, the value half to the output:
score = (q_rope . k_rope + (q_nope Wk) . c + q_nope . bk) and out = Wv (sum p c) + bv (sum p), with
the projections of the modality of each token.

Shapes: B batch, T new tokens, S all tokens, H query heads, G KV heads, M = H / G, R rope dims, N other
dims, D head dim, r latent dims; Q = H * T rows, ordered by KV head, head in its group, token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from mha2mla_vlm.model.modality import Kind, Run, runs_between
from mha2mla_vlm.model.softmax import RunningSoftmax

Piece = tuple[torch.Tensor, torch.Tensor]  # latents [B, n, r] and rotated keys [B, G, n, R] of n tokens


@dataclass(frozen=True)
class Up:
    """`kv_b_proj` of one modality, `weight [G*(N+D), r]`, rows per KV head as N of keys and D of values.

    Where keys are rotated when they are read, `rope_dim` rows of these come before, `[G*(R+N+D), r]`. Its
    parts are views: nothing is kept that could go stale.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    kv_heads: int
    nope_dim: int
    rope_dim: int = 0

    def float(self) -> "Up":
        """The same in float32."""
        return replace(
            self, weight=self.weight.float(), bias=None if self.bias is None else self.bias.float()
        )

    @property
    def rows(self) -> torch.Tensor:
        """`[G, N + D, r]`."""
        return self.weight.view(self.kv_heads, -1, self.weight.shape[-1])

    @property
    def rope(self) -> torch.Tensor:
        """`[G, R, r]`."""
        return self.rows[:, : self.rope_dim]

    @property
    def key(self) -> torch.Tensor:
        """`[G, N, r]`."""
        return self.rows[:, self.rope_dim : self.rope_dim + self.nope_dim]

    @property
    def value(self) -> torch.Tensor:
        """`[G, D, r]`."""
        return self.rows[:, self.rope_dim + self.nope_dim :]

    @property
    def rope_bias(self) -> torch.Tensor | None:
        """`[G, 1, R]`."""
        return None if self.bias is None else self._biases(self.bias)[:, None, : self.rope_dim]

    @property
    def key_bias(self) -> torch.Tensor | None:
        """`[G, N, 1]`."""
        span = slice(self.rope_dim, self.rope_dim + self.nope_dim)
        return None if self.bias is None else self._biases(self.bias)[:, span, None]

    @property
    def value_bias(self) -> torch.Tensor | None:
        """`[G, 1, D]`."""
        first = self.rope_dim + self.nope_dim
        return None if self.bias is None else self._biases(self.bias)[:, None, first:]

    def _biases(self, bias: torch.Tensor) -> torch.Tensor:
        """`[G, R + N + D]`."""
        return bias.view(self.kv_heads, -1)


class Queries(NamedTuple):
    """Scaled queries that meet rotated keys `[B, G, M*T, R]` and latents `[B, Q, r]`, one for each modality;
    None where all dims are rotated.

    `text_constant [B, Q, 1]` is added to scores of text tokens: what their key bias gives more than
    that of visual ones. It differs between modalities, so it does not cancel in the softmax; what is
    common does.
    """

    rope: torch.Tensor
    latent: tuple[torch.Tensor | None, ...]
    text_constant: torch.Tensor | None


class Sums(NamedTuple):
    """Latents summed under the attention weights, by modality `[B, Q, r]`; None where it has no tokens.

    `text_mass [B, Q, 1]` is the weight of text tokens, None where there is one modality.
    """

    latent: tuple[torch.Tensor | None, ...]
    text_mass: torch.Tensor | None


def absorb_limit(heads: int, kv_heads: int, nope_dim: int, head_dim: int) -> int:
    """Most new tokens for which absorbing is less arithmetic than making keys and values of latents:
    T * 2 * H * r (half of that where all dims are rotated) against r * G * (N + D) for each cached token.
    """
    products = 2 if nope_dim else 1  # with unrotated keys, and with values
    return kv_heads * (nope_dim + head_dim) // (products * heads)


def absorb(q_rope: torch.Tensor, q_nope: torch.Tensor, ups: Sequence[Up], scaling: float) -> Queries:
    """Queries `[B, H, T, R]` and `[B, H, T, N]` moved to where they meet latents."""
    batch, heads, new, _ = q_rope.shape
    kv_heads = ups[0].kv_heads
    grouped = (batch, kv_heads, heads // kv_heads * new)
    nope = (q_nope * scaling).reshape(*grouped, q_nope.shape[-1])
    if not q_nope.shape[-1]:
        return Queries((q_rope * scaling).reshape(*grouped, -1), (None,) * len(ups), None)
    latent = tuple((nope @ up.key).reshape(batch, heads * new, -1) for up in ups)
    constant = None
    if len(ups) == 2:
        first, last = ups[0].key_bias, ups[1].key_bias
        if first is not None and last is not None:
            constant = (nope @ (first - last)).reshape(batch, heads * new, 1)
    return Queries((q_rope * scaling).reshape(*grouped, q_rope.shape[-1]), latent, constant)


def expand(sums: Sums, ups: Sequence[Up], new: int) -> torch.Tensor:
    """Outputs `[B, T, H, D]` of summed latents."""
    outputs = []
    kv_heads = ups[0].kv_heads
    for latent, up in zip(sums.latent, ups, strict=True):
        if latent is not None:
            grouped = latent.view(len(latent), kv_heads, -1, latent.shape[-1])
            # in this order also fast on a CPU where a KV head has one query head
            outputs.append((up.value @ grouped.transpose(-1, -2)).transpose(-1, -2))
    output = outputs[0] if len(outputs) == 1 else outputs[0] + outputs[1]
    bias = _mixed_bias(sums, ups)
    output = output if bias is None else output + bias
    return output.reshape(len(output), -1, new, output.shape[-1]).transpose(1, 2)


def _mixed_bias(sums: Sums, ups: Sequence[Up]) -> torch.Tensor | None:
    """The value biases under the weights of their modalities, which sum to 1: `[B, G, M*T, D]`."""
    first, last = ups[0].value_bias, ups[-1].value_bias
    if first is None or last is None:
        return None
    if sums.text_mass is None:
        return last if sums.latent[0] is None else first
    mass = sums.text_mass.view(len(sums.text_mass), first.shape[0], -1, 1)
    return last + mass * (first - last)


def attend(
    queries: Queries,
    piece: Piece,
    runs: Sequence[Run],
    visual: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> Sums:
    """Attention over the tokens of one piece, whose modalities are `runs`; see `attend_pieces`."""
    return attend_scored(queries, _rope_scores(queries, piece[1]), piece[0], runs, visual, mask)


def attend_scored(
    queries: Queries,
    scores: torch.Tensor,
    latent: torch.Tensor,
    runs: Sequence[Run],
    visual: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> Sums:
    """The same where the `scores [B, Q, S]` of rotated keys are known; they are added to in place."""
    weights = _scores(queries, scores, latent, runs, visual, mask).softmax(-1)  # in float32 within
    return _sums(weights, latent, runs, visual, len(queries.latent))


def attend_pieces(
    queries: Queries,
    pieces: Iterable[Piece],
    runs: Sequence[Run],
    visual: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> Sums:
    """Attention over tokens that come piece by piece, of which one at a time is in memory.

    `runs` are the modalities of all tokens in their order; where rows of a batch differ, in runs of
    kind MIXED, `visual [B, S]` shows which. `mask` is over all tokens, as `dense_mask` gives it.
    """
    running, start = RunningSoftmax(), 0
    for piece in pieces:
        stop = start + piece[0].shape[1]
        inside = runs_between(runs, start, stop)
        seen = None if mask is None else mask[..., start:stop]
        which = None if visual is None else visual[:, start:stop]
        scores = _scores(queries, _rope_scores(queries, piece[1]), piece[0], inside, which, seen)
        lse = scores.float().logsumexp(-1, keepdim=True)
        sums = _sums(scores.softmax(-1), piece[0], inside, which, len(queries.latent))
        mass = sums.text_mass
        if mass is None and len(sums.latent) == 2 and sums.latent[0] is not None:  # only text
            mass = torch.ones_like(lse)
        running.add((*sums.latent, mass), lse)
        start = stop
    *latent, mass = (None if x is None else x.to(queries.rope.dtype) for x in running.result())
    return Sums(tuple(latent), mass)


def _rope_scores(queries: Queries, k_rope: torch.Tensor) -> torch.Tensor:
    """Scores `[B, Q, S]` of rotated keys."""
    return (queries.rope @ k_rope.transpose(-1, -2)).flatten(1, 2)


def _scores(
    queries: Queries,
    scores: torch.Tensor,
    latent: torch.Tensor,
    runs: Sequence[Run],
    visual: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Masked scores `[B, Q, S]` of one piece: those of rotated keys and of the others, in place."""
    for start, stop, kind in runs:
        part, keys = scores[..., start:stop], latent[:, start:stop]
        if kind == Kind.MIXED:
            which = _known(visual)[:, None, start:stop]
            other = _add_product(part.clone(), queries.latent[-1], keys)
            part.copy_(torch.where(which, other, _add_text(part, queries, keys)))
        elif kind == Kind.VISION:
            _add_product(part, queries.latent[-1], keys)
        else:
            _add_text(part, queries, keys)
    if mask is None:
        return scores
    by_head = scores.unflatten(1, (-1, mask.shape[-2]))
    return masked(by_head, mask).view_as(scores)


def _add_text(scores: torch.Tensor, queries: Queries, latent: torch.Tensor) -> torch.Tensor:
    _add_product(scores, queries.latent[0], latent)
    return scores if queries.text_constant is None else scores.add_(queries.text_constant)


def _add_product(scores: torch.Tensor, queries: torch.Tensor | None, latent: torch.Tensor) -> torch.Tensor:
    """Add `queries [B, Q, r] @ latent [B, n, r]^T` to scores, in place."""
    if queries is None:
        return scores
    if scores.device.type != "cpu":
        return scores.baddbmm_(queries, latent.transpose(-1, -2))
    for row in range(len(scores)):  # on a CPU a batched product with a transposed side is five times slower
        scores[row].addmm_(queries[row], latent[row].t())
    return scores


def _sums(
    weights: torch.Tensor,
    latent: torch.Tensor,
    runs: Sequence[Run],
    visual: torch.Tensor | None,
    modalities: int,
) -> Sums:
    """Latents under weights `[B, Q, S]`, by modality."""
    sums: list[torch.Tensor | None] = [None] * modalities
    masses = []
    for start, stop, kind in runs:
        part = weights[..., start:stop]
        shares = {0: part} if kind == Kind.TEXT else {modalities - 1: part}
        if kind == Kind.MIXED:
            which = _known(visual)[:, None, start:stop]
            shares = {0: part.masked_fill(which, 0), modalities - 1: part.masked_fill(~which, 0)}
        for index, share in shares.items():
            product, before = share @ latent[:, start:stop], sums[index]
            sums[index] = product if before is None else before + product
        if 0 in shares:
            masses.append(shares[0].sum(-1, keepdim=True))
    one = modalities == 1 or any(x is None for x in sums)
    return Sums(tuple(sums), None if one else torch.stack(masses).sum(0))


def _known(visual: torch.Tensor | None) -> torch.Tensor:
    assert visual is not None, "a run of mixed modality without a mask of it"
    return visual


def dense_mask(
    mask: torch.Tensor | None,
    new: int,
    total: int,
    device: torch.device,
    filled: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Any mask that transformers gives to attention, as one over scores `[.., T, S]`; None hides nothing.

    None means causal; `[B, S]` is only padding, to which causality is added; `[B, 1, T, S]` is
    complete, as bool (True is kept) or to be added. `filled` is how many tokens of S there are, where a
    cache has room for more.
    """
    if mask is not None and mask.ndim == 4:
        return mask[..., :total]
    if mask is None and new == 1 and filled is None:
        return None
    last = (total if filled is None else filled) - new + torch.arange(new, device=device)
    causal = torch.arange(total, device=device) <= last[:, None]
    if mask is None:
        return causal
    shown = mask[:, :total].bool()
    return causal & torch.nn.functional.pad(shown, (0, total - shown.shape[1]))[:, None, None]


def masked(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Scores with a `dense_mask` applied."""
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask
