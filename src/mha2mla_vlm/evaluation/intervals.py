"""How far a mean over some chats may be from that over all."""

from collections.abc import Sequence

import torch

DRAWS = 1000


def bootstrap_interval(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """95% bootstrap interval of `sum(sums) / sum(counts)`, of which each chat has one; the same at each call.

    Chats are drawn, not answers: those of one chat are about the same images. Draws without any count are
    left out.
    """
    generator = torch.Generator().manual_seed(0)
    pairs = torch.tensor([sums, counts], dtype=torch.float64)
    draws = []
    for _ in range(DRAWS):
        total, count = pairs[:, torch.randint(len(sums), (len(sums),), generator=generator)].sum(1)
        if count > 0:
            draws.append(total / count)
    low, high = torch.stack(draws).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
