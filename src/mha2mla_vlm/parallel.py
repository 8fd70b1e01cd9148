"""Several processes that share the chats of a calibration (`accelerate launch`)."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

T = TypeVar("T")


def join_processes(device: torch.device) -> torch.device:
    """Meet the other processes, if there are any; returns the device of this one."""
    if not dist.is_torchelastic_launched():
        return device
    state = PartialState(cpu=device.type == "cpu")
    return device if device.type == "cpu" else state.device


def process_count() -> int:
    """How many processes work on this, 1 where there are no others."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Which of them this is; 0 writes and speaks."""
    return dist.get_rank() if process_count() > 1 else 0


def own_share(items: Sequence[T]) -> list[T]:
    """The items that are this process's."""
    return list(items[process_index() :: process_count()])


def sum_over_processes(tensors: Iterable[torch.Tensor]) -> None:
    """Replace tensors by their sums over all processes, in place."""
    if process_count() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def wait_for_all() -> None:
    """Until all processes are here."""
    if process_count() > 1:
        dist.barrier()
