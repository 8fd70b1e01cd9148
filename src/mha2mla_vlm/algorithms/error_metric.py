"""How much an error in a key or a value matters to what attention gives out. Pure functions.

Errors of tokens are taken as independent. An error e in the key of token j moves the output of
query i by p_ij (q_i . e) (v_j - o_i), one in its value by p_ij e, both seen through `o_proj`.

Shapes: T tokens, H query heads, G KV heads, M = H / G, D head dim, C hidden.
"""

import torch

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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens attention uses, and in which directions errors of keys and values matter.

    `queries [H, T, D]` and `keys [G, T, D]` are rotated, `plain_queries` not; `output [C, H, D]` is
    `o_proj`'s weight, `modality [T]` numbers each token's, and `weights [T]` are how much each query
    counts. Returns the squared attention that each
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
        gram = output[:, head].float().T @ output[:, head].float()
        seen = values[group] @ gram
        lengths = (seen * values[group]).sum(-1)
        for start in range(0, total, QUERY_BLOCK):
            rows = torch.arange(start, min(start + QUERY_BLOCK, total), device=keys.device)
            logits = queries[head, rows] @ keys[group].T * scaling
            later = torch.arange(total, device=keys.device) > rows[:, None]
            attention = logits.masked_fill(later, -torch.inf).softmax(-1)
            mean = attention @ values[group]
            spread = lengths + ((mean @ gram) * mean).sum(-1, keepdim=True) - 2 * mean @ seen.T
            squared = attention.square() * weights[rows, None]
            received += squared.sum(0)
            pull = (squared * spread.clamp_min(0)) @ one_hot  # [queries, E]
            plain = plain_queries[head, rows] * scaling
            metric[:, 0, group] += torch.einsum("te,ta,tb->eab", pull, plain, plain).double()
            metric[:, 1, group] += (squared.sum(0) @ one_hot).double()[:, None, None] * gram.double()
    return received, metric
