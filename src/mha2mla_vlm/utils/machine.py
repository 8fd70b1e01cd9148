"""The machine that something was measured on, for people."""

from collections.abc import Iterator
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """The GPU, or the processor and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}"


def _processor() -> str:
    try:
        lines: Iterator[str] = iter(Path("/proc/cpuinfo").read_text().splitlines())
    except OSError:
        return "CPU"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
