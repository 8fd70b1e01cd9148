"""Methods by name: a table of one line each, read without importing what they do."""

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from mha2mla_vlm.errors import InputError, shown


class Entry(NamedTuple):
    """The module of a method, whose `METHOD` it is, and what the method does in a line."""

    module: str
    summary: str


def find(entries: Mapping[str, Entry], package: str, kind: str, name: Any) -> Any:
    """The method `name`; raises `InputError` for one that is not in the table."""
    check(entries, kind, name)
    return importlib.import_module(f"{package}.{entries[name].module}").METHOD


def check(entries: Mapping[str, Entry], kind: str, name: Any) -> None:
    """Raise `InputError` unless `name` is in the table."""
    if not isinstance(name, str) or name not in entries:
        raise InputError(f"unknown {kind} {shown(name)}; known: {', '.join(entries)}")


def described(entries: Mapping[str, Entry]) -> str:
    """The table in one line, for the help of a command."""
    return "; ".join(f"{name}: {entry.summary}" for name, entry in entries.items()) + "."
