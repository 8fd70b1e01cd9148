"""How much an error in a key or a value matters to what attention gives out. Pure functions.

Errors of tokens are taken as independent. An error e in the key of token j moves the output of query i by
p_ij (q_i . e) (v_j - o_i), one in its value by p_ij e, both seen through `o_proj`. Where a gate s_i
multiplies the output of a head, `gram` of `o_proj` becomes `gram * s_i s_i^T`: exact for values; for keys by
its mean over queries.

Shapes: T tokens, H query heads, G KV heads, M = H / G, D head dim, C hidden.
"""

import torch

from mha2mla_vlm.algorithms.at_once import rows_at_once
from mha2mla_vlm.algorithms.looked_at import Chosen, unseen_by

QUERY_BLOCK = 512  # queries whose attention is held at a time


def attention_usage(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plain_queries: torch.Tensor,
    output: torch.Tensor,
    modality: torch.Tensor,
    weights: torch.Tensor,
    *,
    modalities: int,
    scaling: float,
    gate: torch.Tensor | None = None,
    unseen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens attention uses, and in which directions errors of keys and values matter.

    `queries [H, T, D]` and `keys [G, T, D]` are rotated, `plain_queries` not; `output [C, H, D]` is
    `o_proj`'s weight, `modality [T]` numbers each token's, and `weights [T]` are how much each query
    counts. A `gate [H, T, D]` multiplies the heads' outputs, `unseen [T, T]` are the tokens
    that each query does not see, by default those after it. Returns the squared attention that each
    token receives, `[T]`, and for each modality metrics of errors in plain keys and in values,
    `[E, 2, G, D, D]` in float64: e^T metric e is the squared error of the layer's output, summed
    over queries and tokens, if every token of the modality had the error e.
    """
    heads, total, dim = queries.shape
    kv_heads = len(keys)
    metric = torch.zeros(modalities, 2, kv_heads, dim, dim, dtype=torch.float64, device=keys.device)
    received = torch.zeros(total, device=keys.device)
    one_hot = torch.nn.functional.one_hot(modality, modalities).float()
    for head in range(heads):
        group = head // (heads // kv_heads)
        plain_gram, gram = _grams(output[:, head], None if gate is None else gate[head], weights)
        seen = values[group] @ gram
        for start in range(0, total, QUERY_BLOCK):
            rows = torch.arange(start, min(start + QUERY_BLOCK, total), device=keys.device)
            given = (queries[head, rows], keys[group], values[group], seen, rows, gram, scaling)
            attention, spread = _attend(*given, unseen)
            squared = attention.square() * weights[rows, None]
            received += squared.sum(0)
            pull = (squared * spread) @ one_hot  # [queries, E]
            plain = plain_queries[head, rows] * scaling
            metric[:, 0, group] += torch.einsum("te,ta,tb->eab", pull, plain, plain).double()
            if gate is None:
                gates = (squared.sum(0) @ one_hot).double()[:, None, None]
            else:
                own = gate[head, rows]
                gates = torch.einsum("te,ta,tb->eab", squared @ one_hot, own, own).double()
            metric[:, 1, group] += gates * plain_gram.double()
    return received, metric


def _grams(
    output: torch.Tensor, gate: torch.Tensor | None, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`output^T output [D, D]` of one head `[C, D]`, and the same under the mean of what its `gate [T, D]`
    does to products, by the `weights [T]` of queries.
    """
    gram = output.float().T @ output.float()
    if gate is None:
        return gram, gram
    return gram, gram * (gate.T @ (gate * (weights / weights.sum())[:, None]))


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    rows: torch.Tensor,
    gram: torch.Tensor,
    scaling: float,
    unseen: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one head's rotated queries `[t, D]` of the tokens `rows [t]`: their attention p_ij, and how far each
    value lies from the output, `|v_j - o_i|^2` in the metric `gram [D, D]`; both `[t, T]`. `seen` is
    `values @ gram`, the same for all queries of the head.
    """
    hidden = unseen_by(rows, len(keys), unseen)
    attention = (queries @ keys.T * scaling).masked_fill(hidden, -torch.inf).softmax(-1)
    mean = attention @ values
    lengths = (seen * values).sum(-1)
    spread = lengths + ((mean @ gram) * mean).sum(-1, keepdim=True) - 2 * mean @ seen.T
    return attention, spread.clamp_min(0)


def key_metric(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plain_queries: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    output: torch.Tensor,
    modality: torch.Tensor,
    chosen: Chosen,
    *,
    modalities: int,
    scaling: float,
    rotated: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    unseen: torch.Tensor | None = None,
) -> torch.Tensor:
    """In which directions errors of keys before RoPE matter, where keys are rotated when they are read.

    An error e in the key of token j moves its score by `t_ij . e`, `t_ij = Rot_j^T Rot_i q_i`: what counts is
    the query turned back by the key's position. For each modality this is the sum over i and its j of
    `w_i p_ij^2 |v_j - o_i|^2 t_ij t_ij^T`, `[E, G, D, D]` in float64, to take the place of the keys' part of
    `attention_usage`.

    Arguments are those of `attention_usage`; `tables` are cos and sin `[T, P]`, `chosen` the queries to look
    at. Of a head with `rotated [G, P]` only those pairs are rotated when read; the others meet plain
    queries, as after partial RoPE.
    """
    (heads, total, dim), kv_heads = queries.shape, len(keys)
    metric = torch.zeros(modalities, kv_heads, dim, dim, dtype=torch.float64, device=keys.device)
    members = [(modality == number).nonzero()[:, 0] for number in range(modalities)]
    block = rows_at_once(total * dim, keys.device)
    for head in range(heads):
        group, (rows, weights) = head // len(chosen), chosen[head % len(chosen)]
        # by the queries that are looked at
        _, gram = _grams(output[:, head], None if gate is None else gate[head, rows], weights)
        seen, kept = values[group] @ gram, None if rotated is None else rotated[group]
        for part, weight in zip(rows.split(block), weights.split(block), strict=True):
            query, plain = queries[head, part], plain_queries[head, part]
            given = (query, keys[group], values[group], seen, part, gram, scaling)
            attention, spread = _attend(*given, unseen)
            pull = (attention.square() * spread * weight[:, None]).sqrt() * scaling
            for number, tokens in enumerate(members):
                cos, sin = (table[tokens] for table in tables)
                turned = (turned_back(query, plain, cos, sin, kept) * pull[:, tokens, None]).flatten(0, 1)
                metric[number, group] += (turned.T @ turned).double()
    return metric


def turned_back(
    queries: torch.Tensor,
    plain: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotated: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotated `queries [t, D]` turned back by the positions of keys, whose tables are `cos, sin [n, P]`:
    `Rot_j^T q_i`, `[t, n, D]`. Pairs that are not `rotated [P]` are those of the `plain` queries.
    """
    a, b = queries[:, None].chunk(2, dim=-1)
    turned = torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)
    return turned if rotated is None else turned.where(rotated.repeat(2), plain[:, None])
