"""What a mean over some chats, and changes in some answers, show of all."""

import math
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


def sign_test(worse: int, better: int) -> float:
    """How likely changes this one-sided or more are if each is worse or better by chance (two-sided)."""
    changed, fewer = worse + better, min(worse, better)
    tail = sum(math.comb(changed, number) for number in range(fewer + 1))
    return min(1.0, 2 * tail / 2**changed)
