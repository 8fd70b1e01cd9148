"""Several processes that share the chats of a calibration (`accelerate launch`).

They do so only within `shared_work`: a process group by itself does not say that all processes call this.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from mha2mla_vlm.errors import InputError
from mha2mla_vlm.utils.folders import claimed

T = TypeVar("T")
_SHARED: ContextVar[bool] = ContextVar("shared_work", default=False)


def join_processes(device: torch.device) -> torch.device:
    """Meet the other processes, if there are any; returns the device of this one."""
    if not dist.is_torchelastic_launched():
        return device
    state = PartialState(cpu=device.type == "cpu")
    return device if device.type == "cpu" else state.device


@contextlib.contextmanager
def shared_work(shared: bool = True) -> Iterator[None]:
    """Within the context, all processes of the group, if there is one, work together, or each by itself."""
    token = _SHARED.set(shared)
    try:
        yield
    finally:
        _SHARED.reset(token)


def process_count() -> int:
    """How many processes work on this, 1 where there are no others."""
    together = _SHARED.get() and dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if together else 1


def process_index() -> int:
    """Which of them this is; 0 writes and speaks."""
    return dist.get_rank() if process_count() > 1 else 0


def own_share(items: Sequence[T]) -> Sequence[T]:
    """The items that are this process's."""
    return items[process_index() :: process_count()]


def sum_over_processes(tensors: Iterable[torch.Tensor]) -> None:
    """Replace tensors by their sums over all processes, in place."""
    if process_count() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


@contextlib.contextmanager
def claimed_by_first(output: str | Path) -> Iterator[None]:
    """Within the context `output` is `claimed` by the first process; if it cannot, all are refused."""
    with contextlib.ExitStack() as stack:
        refused: list[str | None] = [None]
        if process_index() == 0:
            try:
                stack.enter_context(claimed(output))
            except InputError as error:
                refused = [str(error)]
        if process_count() > 1:
            dist.broadcast_object_list(refused)
        if refused[0] is not None:
            raise InputError(refused[0])
        yield


def wait_for_all() -> None:
    """Until all processes are here."""
    if process_count() > 1:
        dist.barrier()
