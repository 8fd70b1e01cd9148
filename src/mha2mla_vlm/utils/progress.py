"""Progress and messages for people, on standard error; standard output is for the result."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mha2mla_vlm.errors import Interrupted


def console() -> Console:
    """A console on standard error, as it is now."""
    return Console(stderr=True)


T = TypeVar("T")


def track(items: Iterable[T], title: str) -> Iterator[T]:
    """Iterate with a progress bar that disappears at the end."""
    with Progress(console=console(), transient=True) as bar:
        task = bar.add_task(title, total=len(items) if isinstance(items, Sized) else None)
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

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

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
