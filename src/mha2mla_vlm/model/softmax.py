"""Softmax over tokens that come part by part (online softmax)."""

from collections.abc import Sequence
from typing import Any

import torch


class RunningSoftmax:
    """Sums under the softmax of all scores so far, in float32; a part is added once and forgotten."""

    def __init__(self) -> None:
        self.top: torch.Tensor | None = None
        self.mass: torch.Tensor | None = None
        self.sums: list[Any] = []

    def add(
        self, sums: Sequence[torch.Tensor | None], top: torch.Tensor, mass: torch.Tensor | None = None
    ) -> None:
        """Add a part's `sums [.., d]` (None: zero) of values under weights `exp(score - top)`.

        `mass [.., 1]` is the sum of these weights, `top [.., 1]` any number close to the largest score. Sums
        under the part's own softmax are those where `top` is its log-sum-exp, and then `mass` is left out.
        """
        top = top.float()
        mass = torch.ones_like(top) if mass is None else mass
        if self.top is None or self.mass is None:
            self.top, self.mass = top, mass
            self.sums = [None if x is None else x.float() for x in sums]
            return
        highest = torch.maximum(self.top, top)
        old, new = (self.top - highest).exp(), (top - highest).exp()
        self.top, self.mass = highest, self.mass * old + mass * new
        before = [None if x is None else x * old for x in self.sums]
        added = [None if x is None else x * new for x in sums]
        self.sums = [
            b if a is None else a if b is None else a + b for a, b in zip(before, added, strict=True)
        ]

    def result(self) -> list[Any]:
        """The sums under the softmax over all parts; raises `ValueError` if there are none."""
        if self.mass is None:
            raise ValueError("no tokens to attend to")
        return [None if x is None else x / self.mass for x in self.sums]
