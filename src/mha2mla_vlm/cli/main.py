"""The command `mha2mla`: each command a few lines over the API."""

import atexit
import gc
import logging
import signal
import sys
from typing import Annotated

import typer

from mha2mla_vlm.cli import converting, looking, training
from mha2mla_vlm.cli.results import command
from mha2mla_vlm.cli.zoo import zoo_app
from mha2mla_vlm.errors import InputError, Interrupted, first_line
from mha2mla_vlm.utils.progress import console

USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # of click, which typer brings its own of
FIRST, CONVERT, MEASURE, TRAIN, USE = "First steps", "Convert", "Measure", "Fine-tune", "Use"

app = typer.Typer(
    help="Convert vision-language models to multi-head latent attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["--help", "-h"]},
)
for panel, functions in (  # in the order of work, as --help lists them
    (FIRST, (looking.demo,)),
    (CONVERT, (converting.convert, converting.import_published)),
    (MEASURE, (looking.evaluate, looking.inspect, looking.report, looking.bench, looking.task)),
    (TRAIN, (training.finetune, training.recipes)),
    (USE, (looking.generate, looking.chat)),
):
    for function in functions:
        command(app, panel, function.__name__.replace("_", "-"))(function)
app.add_typer(zoo_app, name="zoo", rich_help_panel=FIRST)


def _version(asked: bool) -> None:
    if asked:
        from mha2mla_vlm import __version__

        print(f"mha2mla {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where a system error happened.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Convert vision-language models to multi-head latent attention.

    On a terminal a command ends with a table; else, or with `--json`, with one line of JSON.
    """


def _is_of_the_system(error: Exception) -> bool:
    """Whether an error is none of the program: PyTorch has a `RuntimeError` for memory that is lacking."""
    lacking = ("out of memory", "can't allocate memory")
    return not isinstance(error, RuntimeError) or any(words in str(error) for words in lacking)


def _set_up_logging() -> None:
    """Ours on standard error, without that of other libraries."""
    from rich.logging import RichHandler

    handler = RichHandler(console=console(), show_time=False, show_path=False, show_level=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("mha2mla_vlm").setLevel(logging.INFO)
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # what it raises is our line
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of what is on disk


def _run() -> int:
    """Run the command that was asked for; its exit code."""
    try:
        code = app(prog_name="mha2mla", standalone_mode=False)
    except USAGE_ERROR as error:
        wrong: typer.BadParameter = error  # type: ignore[assignment]  # or one like it
        if said := wrong.format_message():  # nothing, where the help was shown instead
            path = wrong.ctx.command_path if wrong.ctx is not None else "mha2mla"
            raise InputError(f"{said.rstrip('.')}; see {path} --help") from None
        return 2
    except typer.Abort:
        raise Interrupted from None
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry point: quiet libraries, messages on stderr, bad input as one line and exit code 2."""
    atexit.register(gc.freeze)  # else Python searches all of PyTorch for garbage as it ends, for seconds
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
        _set_up_logging()
        sys.exit(_run())
    except InputError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (OSError, MemoryError, RuntimeError) as error:  # what disks, files, network and memory can cause
        if "--debug" in sys.argv or not _is_of_the_system(error):
            raise
        print(f"error: {first_line(error)}; --debug shows where", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, Interrupted) as interrupt:
        print(f"interrupted{f': {interrupt}' if interrupt.args else ''}", file=sys.stderr)
        sys.exit(130)
