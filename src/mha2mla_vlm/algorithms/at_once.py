"""How much of a large intermediate result is there at a time."""

import torch

CACHED = 1 << 20  # float32 numbers that stay in a processor's cache
MANY = 1 << 24  # that keep a GPU busy


def rows_at_once(numbers: int, device: torch.device) -> int:
    """How many rows of so many numbers to work on at a time, at least one."""
    return max(1, (CACHED if device.type == "cpu" else MANY) // numbers)
