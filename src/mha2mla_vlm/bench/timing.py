"""Time and memory of functions, taken in turn so that a busy machine is unkind to all alike."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mha2mla_vlm.utils.memory import forget_peak, peak_resident_bytes, resident_bytes

ROUNDS = (5, 200)  # least and most
WARM_UP = 2
HOPELESS = 4.0  # times the fastest


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of a call: the median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        """Of at least two calls."""
        low, median, high = statistics.quantiles(seconds, n=4)
        return cls(median=median, low=low, high=high)


def time_in_turn(
    functions: Mapping[str, Callable[[], Any]],
    *,
    device: torch.device,
    seconds: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
    captured: bool = False,
) -> dict[str, Timing]:
    """Time each function round by round for about `seconds` altogether, five rounds at least.

    What is four times slower than the fastest is called twice and left out of the rounds. On a busy machine
    `clock` may be `time.thread_time`, for one thread. `captured` functions of a GPU are replayed as CUDA
    graphs, so that what is timed is the GPU and not Python.
    """
    if captured and device.type == "cuda":
        functions = {name: capture(function, device) for name, function in functions.items()}
    taken = {
        name: [_seconds(function, device, clock) for _ in range(WARM_UP)]
        for name, function in functions.items()
    }
    fastest = min(min(values) for values in taken.values())
    in_turn = {name: f for name, f in functions.items() if min(taken[name]) < HOPELESS * fastest}
    taken |= {name: [] for name in in_turn}
    stop = time.perf_counter() + seconds
    least, most = ROUNDS
    for done in range(most):
        if done >= least and time.perf_counter() > stop:
            break
        for name, function in in_turn.items():
            taken[name].append(_seconds(function, device, clock))
    return {name: Timing.of(values) for name, values in taken.items()}


def capture(function: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """A function's work on a GPU as a CUDA graph, to be replayed over the same memory."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):  # compiles kernels, and makes what is kept between calls
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def _seconds(function: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> float:
    wait(device)
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        wait(device)
        return start.elapsed_time(stop) / 1e3
    begin = clock()
    function()
    wait(device)
    return clock() - begin


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int | None]]:
    """Within the context, watch memory; the dict then has `bytes`, the most that was held over the start.

    On a GPU allocated memory, else the process's resident memory, or None where Linux does not report it.
    """
    found: dict[str, int | None] = {"bytes": None}
    start = _reset_peak(device)
    yield found
    if start is not None:
        found["bytes"] = max(_peak(device) - start, 0)


def _reset_peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return resident_bytes() if forget_peak() else None


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes() or 0
