"""Rotation by rotary tables, as decoder layers get them. Pure functions over tensors.

Shapes: R rope dims kept per head.
"""

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs `(i, i + R/2)` of `x [..., R]` by `cos, sin [..., R/2]`."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
