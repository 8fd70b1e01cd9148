"""Methods by name: a table of one line each, read without importing what they do."""

import importlib
from typing import Any, NamedTuple

from mha2mla_vlm.errors import InputError, shown


class Entry(NamedTuple):
    """The module of a method, whose `METHOD` it is, and what the method does in a line."""

    module: str
    summary: str


class Registry(dict[str, Entry]):
    """The methods of one `kind`, modules of `package`."""

    def __init__(self, kind: str, package: str, entries: dict[str, Entry]) -> None:
        super().__init__(entries)
        self.kind, self.package = kind, package

    def check(self, name: Any) -> None:
        """Raise `InputError` unless there is a method of this name."""
        if not isinstance(name, str) or name not in self:
            raise InputError(f"unknown {self.kind} {shown(name)}; known: {', '.join(self)}")

    def find(self, name: Any) -> Any:
        """The method of this name; raises `InputError` for an unknown one."""
        self.check(name)
        return importlib.import_module(f"{self.package}.{self[name].module}").METHOD

    def described(self) -> str:
        """All in one line, for the help of a command."""
        return "; ".join(f"{name}: {entry.summary}" for name, entry in self.items()) + "."
