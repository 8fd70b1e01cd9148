"""The pairs without which attention changes most stay rotated (arXiv 2601.11464, section 3.1)."""

import torch

from mha2mla_vlm.algorithms.looked_at import unseen_by
from mha2mla_vlm.algorithms.pair_selection.base import Attended, PairSelection, as_pairs


def pair_kl_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scaling: float,
    *,
    unrotated: tuple[torch.Tensor, torch.Tensor] | None = None,
    unseen: torch.Tensor | None = None,
    max_queries: int = 256,
) -> torch.Tensor:
    """KL divergence of attention from attention without a pair, for each pair: `[G, P]`.

    `queries [H, T, D]` and `keys [G, T, D]` are rotated; attention is causal, or does not see what is `unseen
    [T, T]`. The mean is over
    queries (at most `max_queries`, evenly spread) and the group's query heads; with the part c of
    the logits that goes it is E_p[c] + log E_p[exp(-c)]. That part is the whole pair's
    (arXiv 2601.11464, section 3.1), or, given the `unrotated` queries and keys, only what its
    rotation adds: what conversion really takes away.
    """
    kv_heads, total, _ = keys.shape
    rows = torch.linspace(0, total - 1, min(total, max_queries), device=keys.device).round().long()
    hidden = unseen_by(rows, total, unseen)

    def parts_of(group: int, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        grouped = queries[:, rows].float().unflatten(0, (kv_heads, -1))[group]
        return torch.einsum("mtpc,spc->pmts", as_pairs(grouped), as_pairs(keys[group].float())) * scaling

    scores = torch.zeros(kv_heads, keys.shape[-1] // 2, device=keys.device)
    for group in range(kv_heads):
        parts = parts_of(group, queries, keys)
        logits = parts.sum(0).masked_fill(hidden, -torch.inf)
        if unrotated is not None:
            parts = parts - parts_of(group, *unrotated)
        weights, total_log = logits.softmax(-1), logits.logsumexp(-1)
        for pair, part in enumerate(parts):
            kl = (weights * part).sum(-1) + (logits - part).logsumexp(-1) - total_log
            scores[group, pair] = kl.mean()
    return scores


def scores(chat: Attended) -> torch.Tensor:
    """Those of one chat, `[G, P]`."""
    return pair_kl_scores(chat.rotated_queries, chat.rotated_keys, chat.scaling, unseen=chat.unseen)


METHOD = PairSelection(chat_scores=scores)
