"""Progress and messages for people, on standard error; standard output is for the result."""

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress


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
