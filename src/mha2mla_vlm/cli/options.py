"""What the commands share: arguments, options, and how a result is printed."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from mha2mla_vlm.cli.results import Command
from mha2mla_vlm.model.shipped import ZOO_NAMES, ZOO_PREFIX

LARGEST = 2**31 - 1  # of whole numbers: beyond, one library or another fails


class DType(StrEnum):
    """Data types of weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class SplitName(StrEnum):
    """Which scans pages are made of."""

    train = "train"
    test = "test"


def zoo_models() -> list[str]:
    """What completes the name of a model; where nothing does, the shell looks for folders."""
    return [ZOO_PREFIX + name for name in ZOO_NAMES]


ModelArgument = Annotated[
    str,
    typer.Argument(help="A folder, a hub id, or zoo:NAME.", show_default=False, autocompletion=zoo_models),
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data", help="Chats: JSONL, LLaVA JSON, parquet, datasets folder, hub id.", show_default=False
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Estimate sizes, memory, disk and time, and stop.")
]
AdapterOption = Annotated[
    str | None,
    typer.Option(help="LoRA adapter (peft) to merge into the model first.", show_default=False),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Resume an interrupted run to this output.")]
SpillOption = Annotated[
    Path | None, typer.Option(help="Folder for hidden states.  [default: beside the output]")
]
PushOption = Annotated[
    str | None, typer.Option(help="Hub repository to send the result to.", show_default=False)
]
OutputOption = Annotated[
    Path, typer.Option("--output", "-o", help="Folder to write; new or empty.", show_default=False)
]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, max=LARGEST, help="Tokens of an answer, at most.")]
CacheBitsOption = Annotated[
    int | None, typer.Option(help="Quantise the cache to 8, 4 or 2 bits.  [default: not quantised]")
]
DTypeOption = Annotated[DType, typer.Option(help="Data type to run in; auto is the stored one.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]


def mirrored(config_class: type) -> Callable[[Command], Command]:
    """Give a command an option for each plain field of a configuration; what is not given is None."""
    hints = get_type_hints(config_class)

    def decorate(command: Command) -> Command:
        """The command with a signature that typer reads the options from."""
        signature = inspect.signature(command, eval_str=True)
        parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        for field in fields(config_class):
            if "help" not in field.metadata:
                continue
            default = "" if field.default is None else f"  [default: {field.default}]"
            kind = hints[field.name] if "None" in str(field.type) else hints[field.name] | None
            most = LARGEST if int in get_args(kind) else None
            said = {"help": field.metadata["help"] + default, "show_default": False}
            option = typer.Option(**said, max=most, autocompletion=_completion(field.metadata["known"]))
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[kind, option],
                )
            )
        changed: Any = command
        changed.__signature__ = signature.replace(parameters=parameters)
        changed.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _completion(values: tuple[str, ...]) -> Callable[[], tuple[str, ...]] | None:
    return (lambda: values) if values else None


def load_model(name: str, dtype: DType, device: str) -> tuple[Any, Any]:
    """A model and its processor."""
    from mha2mla_vlm.model.checkpoint import load, load_processor, pick_device

    target = pick_device(device)
    return load(name, dtype=dtype.value).to(target), load_processor(name)
