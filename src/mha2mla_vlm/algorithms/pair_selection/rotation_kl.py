"""The pairs without whose rotation attention changes most stay rotated."""

from typing import Any

import torch

from mha2mla_vlm.algorithms.pair_selection.base import Attended, PairSelection
from mha2mla_vlm.algorithms.pair_selection.mkl import pair_kl_scores


def scores(chat: Attended) -> torch.Tensor:
    """Those of one chat, `[G, P]`."""
    given: dict[str, Any] = {"unrotated": (chat.queries, chat.keys), "unseen": chat.unseen}
    return pair_kl_scores(chat.rotated_queries, chat.rotated_keys, chat.scaling, **given)


METHOD = PairSelection(chat_scores=scores)
