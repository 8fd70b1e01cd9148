"""The one exception that means "the input is wrong", as opposed to "the code is wrong"."""

from importlib.util import find_spec


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
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
