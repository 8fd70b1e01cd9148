"""Several processes that share the chats of a calibration (`accelerate launch`).

They do so only within `shared_work`: a process group by itself does not say that all processes call this.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState

from mha2mla_vlm.errors import InputError
from mha2mla_vlm.utils.folders import claimed

PARTS = 8  # of a sum over items: 1, 2, 4 and 8 processes have whole ones
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


def own_share(total: int) -> range:
    """Which of `total` items are this process's."""
    parts = _own_parts(total, process_index())
    return range(parts[0].start, parts[-1].stop)


def _own_parts(total: int, process: int) -> list[range]:
    """Items of each part of a sum that are a process's; some may be empty."""
    processes = process_count()
    count = PARTS if PARTS % processes == 0 else processes
    bounds = [total * part // count for part in range(count + 1)]
    parts, own = [range(*pair) for pair in itertools.pairwise(bounds)], count // processes
    return parts[process * own : (process + 1) * own]


class SharedSums:
    """Sums of tensors by name over `total` items, of which each process adds its `own_share` in order.

    Sums are rounded, so their order counts. Here it is the same for 1, 2, 4 and 8 processes, and so are the
    bits: items are added up to parts, and parts to the whole. Every process must have an item, and items the
    same names and shapes.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._parts: dict[int, dict[str, torch.Tensor]] = {}  # by their first item

    def add(self, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add an item's tensors."""
        parts = _own_parts(self.total, process_index())
        start = next(part.start for part in parts if number in part)
        if start in self._parts:
            _add(self._parts[start], tensors)
            return
        self._fold()
        self._parts[start] = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}

    def _fold(self) -> None:
        """Add up what the first process has, which nothing comes before."""
        if process_index() == 0 and len(self._parts) > 1:
            first, second = self._parts.values()
            _add(first, second)
            self._parts = {0: first}

    def over_processes(self) -> dict[str, torch.Tensor]:
        """The sums, in all processes."""
        self._fold()
        own = next(iter(self._parts.values()))
        if process_count() == 1:
            return own
        found = self._broadcast(0, own if process_index() == 0 else None, own)
        for process in range(1, process_count()):
            for part in filter(len, _own_parts(self.total, process)):
                _add(found, self._broadcast(process, self._parts.get(part.start), own))
        return found

    def _broadcast(
        self, process: int, held: dict[str, torch.Tensor] | None, like: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What a process holds, in all of them."""
        tensors = {name: torch.empty_like(tensor) for name, tensor in like.items()} if held is None else held
        for name in sorted(tensors):
            dist.broadcast(tensors[name], src=process)
        return tensors


def _add(sums: dict[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        sums[name] += tensor


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
