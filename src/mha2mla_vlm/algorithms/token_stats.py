"""Sums over tokens, from which factors are made.

Shapes: G KV heads, D head dim, C hidden or, where keys are normed, 2 G D.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch


@dataclass
class TokenStats:
    """Sums over the tokens of one modality that go into a layer's attention: over the x of which latents are
    made, each of weight w.

    `moment [C, C]` is the sum of w x x^T, `total [C]` of w x, `mass` of w, all in
    float64; `metric [2, G, D, D]`, if there is one, that of `error_metric.attention_usage`, of
    plain keys and values; where keys are rotated at read `[3, G, D, D]`, also of keys before RoPE.
    """

    count: int
    mass: float
    moment: torch.Tensor
    total: torch.Tensor
    metric: torch.Tensor | None = None

    @classmethod
    def of(
        cls, inputs: torch.Tensor, weights: torch.Tensor | None = None, metric: torch.Tensor | None = None
    ) -> Self:
        """Of inputs `[tokens, C]` with `weights [tokens]`, by default 1.

        In float64: what few tokens leave out must come out as nothing, not as the rounding of what they do.
        """
        inputs = inputs.double()
        weighted = inputs if weights is None else inputs * weights[:, None]
        mass = float(len(inputs) if weights is None else weights.sum())
        return cls(len(inputs), mass, weighted.T @ inputs, weighted.sum(0), metric)

    def __add__(self, other: "TokenStats") -> "TokenStats":
        """Of the tokens of both."""
        metric = None if self.metric is None or other.metric is None else self.metric + other.metric
        return TokenStats(
            self.count + other.count,
            self.mass + other.mass,
            self.moment + other.moment,
            self.total + other.total,
            metric,
        )

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """All of it, by name."""
        sums = self.moment.new_tensor([self.count, self.mass])
        return {"sums": sums, "moment": self.moment, "total": self.total, "metric": self.metric}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> Self:
        """From `tensors`."""
        count, mass = tensors["sums"].tolist()
        return cls(int(count), mass, tensors["moment"], tensors["total"], tensors.get("metric"))

    @property
    def mean(self) -> torch.Tensor:
        """The mean token `[C]`."""
        return self.total / max(self.mass, torch.finfo(torch.float32).tiny)

    def centered(self) -> "TokenStats":
        """With the moment about the mean."""
        return replace(self, moment=self.moment - self.mass * self.mean[:, None] * self.mean)
