"""Which queries are looked at, and which tokens they do not see."""

from collections.abc import Sequence

import torch

# Places `[t]` of some queries and their weights `[t]`, for each of the heads that share a KV head.
Chosen = Sequence[tuple[torch.Tensor, torch.Tensor]]


def unseen_by(rows: torch.Tensor, tokens: int, unseen: torch.Tensor | None) -> torch.Tensor:
    """Which of T `tokens` queries at `rows [t]` do not see, `[t, T]`: by `unseen [T, T]`, else later ones."""
    if unseen is not None:
        return unseen[rows]
    return torch.arange(tokens, device=rows.device) > rows[:, None]
