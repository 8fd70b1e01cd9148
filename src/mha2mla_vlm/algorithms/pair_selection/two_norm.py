"""The pairs that are longest in queries and keys stay rotated (arXiv 2502.14837, 2-norm)."""

import torch

from mha2mla_vlm.algorithms.pair_selection.base import Attended, PairSelection, as_pairs


def two_norm_scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Mean length of each pair in queries `[H, T, D]` times that in keys `[G, T, D]`: `[G, P]`.

    Summed over the group's query heads. RoPE does not change lengths, so rotated and plain inputs
    give the same.
    """
    q_length = as_pairs(queries.float()).norm(dim=-1).mean(1)
    k_length = as_pairs(keys.float()).norm(dim=-1).mean(1)
    return q_length.view(len(keys), -1, q_length.shape[-1]).sum(1) * k_length


def scores(chat: Attended) -> torch.Tensor:
    """Those of one chat, `[G, P]`."""
    return two_norm_scores(chat.queries, chat.keys)


METHOD = PairSelection(chat_scores=scores)
