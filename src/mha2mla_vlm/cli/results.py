"""What a command gives: a table on a terminal, one JSON line anywhere else."""

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.table import Table
from typer.core import TyperCommand

from mha2mla_vlm.errors import InputError, Interrupted
from mha2mla_vlm.utils.progress import console

SHARES = ("exact_match", "agreement")  # in the names of what is shown in percent
LONGEST = 12  # values of a list that are shown


@dataclass(frozen=True)
class Result:
    """The `values` of a command, for scripts, and what a person is shown instead of all of them."""

    values: dict[str, Any]
    table: RenderableType | None = None


Command = Callable[..., Result | None]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON line, as without a terminal.")
]


class PlainCommand(TyperCommand):
    """A command whose help is plain text: in the columns that rich draws, long names are cut."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"rich_markup_mode": None})


def command(
    app: typer.Typer, panel: str | None = None, name: str | None = None
) -> Callable[[Command], Command]:
    """Make a function a command of `app`, whose result is printed, with the option `--json`.

    None is the result of a process that reports nothing.
    """

    def register(function: Command) -> Command:
        signature = inspect.signature(function, eval_str=True)
        option = inspect.Parameter(
            "as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=JsonOption
        )

        @functools.wraps(function)
        def run(*, as_json: bool, **given: Any) -> None:
            try:
                result = function(**given)
            except KeyboardInterrupt:
                raise Interrupted from None
            if result is not None:
                show(result, as_json=as_json)

        changed: Any = run
        changed.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])
        changed.__annotations__ = {p.name: p.annotation for p in changed.__signature__.parameters.values()}
        app.command(name, cls=PlainCommand, rich_help_panel=panel)(run)
        return function

    return register


def show(result: Result, *, as_json: bool = False) -> None:
    """Print a result: its table if standard output is a terminal, else its values as the last line."""
    try:
        if sys.stdout.isatty() and not as_json:
            Console().print(facts(result.values) if result.table is None else result.table)
            return
        if result.table is not None and not as_json:
            console().print(result.table)
        print(json.dumps(result.values), flush=True)
    except OSError as error:
        # what could not be written would be tried again, and fail, as Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise InputError(f"standard output cannot be written to: {error.strerror}") from None


def facts(values: dict[str, Any]) -> Table:
    """A table of plain values, rounded and with units."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _rows(values):
        table.add_row(name, value)
    return table


def _rows(values: dict[str, Any], indent: str = "", unit: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        title = indent + name.replace("_", " ")
        if isinstance(value, dict) and value:
            yield title, ""
            yield from _rows(value, indent + "  ", "seconds" if name == "seconds" else "")
        else:
            yield title, _worded(name + unit, value)


def _worded(name: str, value: Any) -> str:
    """A value as a person reads it; its name says what it is a number of."""
    if value is None or value == {}:
        return "-"
    if isinstance(value, list):
        if len(value) > 1 and all(item == value[0] for item in value):
            return f"{_worded(name, value[0])} in each of {len(value)}"
        more = f" and {len(value) - LONGEST} more" if len(value) > LONGEST else ""
        return ", ".join(_worded(name, item) for item in value[:LONGEST]) + more
    if isinstance(value, dict):
        return ", ".join(f"{key} {_worded(key, inner)}" for key, inner in value.items())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return _number(name, value)


def _number(name: str, value: float) -> str:
    if any(share in name for share in SHARES):
        return f"{value:.1%}"
    if "bytes" in name:
        return decimal(int(value)) if value >= 1e5 else f"{value:,.0f} bytes"
    if "seconds" in name:
        return f"{value:.1f} s"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
