"""Progress and messages for people, on standard error; standard output is for the result."""

import contextlib
import functools
import time
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Protocol, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mha2mla_vlm.errors import Interrupted


class Display(Protocol):
    """A bar or a spinner, which can be shown again after it was taken away."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


T = TypeVar("T")
D = TypeVar("D", bound=Display)
_displays: list[Display] = []  # that are on; only the last is shown, as a terminal has room for one


@functools.cache
def console() -> Console:
    """The console on standard error, wherever that goes now; one, as lines must know of what is live."""
    return Console(stderr=True)


@contextlib.contextmanager
def displayed(display: D) -> Iterator[D]:
    """Within the context, a bar or a spinner is on, in the place of the one around it, if there is one.

    Only people see it: nothing is written where standard error is no terminal.
    """
    if not (console().is_interactive or console().is_jupyter):
        yield display
        return
    if _displays:
        _displays[-1].stop()
    _displays.append(display)
    display.start()
    try:
        yield display
    finally:
        display.stop()
        _displays.remove(display)
        if _displays:
            _displays[-1].start()


class _Nothing:
    """The display of what shows itself."""

    def start(self) -> None:
        """Nothing to show."""

    def stop(self) -> None:
        """Nothing was shown."""


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Within the context, no bar or spinner of ours is on, as another library shows its own."""
    with displayed(_Nothing()):
        yield


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Within the context, a spinner says what is being done, if standard error is a terminal."""
    with displayed(console().status(text)):
        yield


def track(items: Iterable[T], title: str, count: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar that disappears at the end; `count` is for items that have no length."""
    with displayed(Progress(console=console(), transient=True)) as bar:
        task = bar.add_task(title, total=len(items) if isinstance(items, Sized) else count)
        for item in items:
            yield item
            bar.advance(task)


@contextlib.contextmanager
def kept(folder: Path, how: str) -> Iterator[None]:
    """Within the context, an interrupt says that the work so far is kept, and `how` to resume."""
    try:
        yield
    except KeyboardInterrupt:
        if not folder.is_dir():
            raise
        raise Interrupted(f"what is done is kept in {folder}; {how}") from None


class Phases:
    """A bar over steps of several phases, which shows the phase and the time left; and the seconds of each.

    The first `done` of `total` steps are done already. Seconds are added to those given, if any are.
    """

    def __init__(
        self,
        title: str,
        total: int,
        done: int = 0,
        *,
        shown: bool = True,
        seconds: dict[str, float] | None = None,
    ) -> None:
        self.seconds: dict[str, float] = {} if seconds is None else seconds
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[phase]}"),
            console=console(),
            transient=True,
            disable=not shown,
        )
        self._task = self._bar.add_task(title, total=total, completed=done, phase="")
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(displayed(self._bar))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within the context, work of this phase is done; phases do not nest."""
        self._bar.update(self._task, phase=name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def advance(self) -> None:
        """A step is done."""
        self._bar.advance(self._task)
