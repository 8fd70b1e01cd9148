"""The one exception that means "the input is wrong", as opposed to "the code is wrong"."""

import contextlib
import reprlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

_LONGEST = 300  # characters of another library's message
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 3


class InputError(ValueError):
    """Bad input: one line with the bad value, what is accepted and what to do.

    The command line prints it without a traceback and exits with 2.
    """


class Interrupted(BaseException):
    """An interrupt of work that can be resumed, which it says; click would hide a `KeyboardInterrupt`."""


def need(package: str, extra: str, purpose: str) -> None:
    """Raise `InputError` unless a package is installed that only an extra of this project brings."""
    if find_spec(package) is None:
        raise InputError(f"{purpose} needs the package {package}: pip install 'mha2mla-vlm[{extra}]'")


def first_line(error: Exception) -> str:
    """What an error says, in one line that is not too long."""
    if isinstance(error, KeyError) and error.args:
        return f"{shown(error.args[0])} is missing"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return said if len(said) <= _LONGEST else said[:_LONGEST] + "..."


@contextlib.contextmanager
def reading(what: str, explain: Callable[[Exception], str] = first_line) -> Iterator[None]:
    """Within, other libraries read what a user gave, and whatever they raise is about it: an `InputError`.

    Lack of memory is not. `explain` says what an error means.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"cannot read {what}: {explain(error)}") from error


def shown(value: Any) -> str:
    """A bad value in a message: as Python writes it, cut where it is long or deep."""
    return _SHORT.repr(value)


def shown_path(path: Any) -> str:
    """A path or a name in a message: without what would break the line, cut where it is long."""
    text = repr(str(path))[1:-1]
    return text if len(text) <= 250 else f"{text[:120]}...{text[-120:]}"
