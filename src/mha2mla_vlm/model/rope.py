"""Rotation by rotary tables, as decoder layers get them. Pure functions over tensors.

Shapes: B batch, T tokens, D head dim, R rope dims kept per head.
"""

from typing import Any

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs `(i, i + R/2)` of `x [..., R]` by `cos, sin [..., R/2]`."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def one_table(table: torch.Tensor, config: Any) -> torch.Tensor:
    """A rotary table as `[B, T, D]`, under a language model's config.

    transformers 5.16 hands layers the time, height and width tables of multimodal RoPE apart,
    `[3, B, T, D]`; later versions merge their sections first.
    """
    if table.ndim == 3:
        return table
    sections = 2 * list(config.rope_parameters["mrope_section"])
    parts = table.split(sections, dim=-1)
    return torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=-1)
