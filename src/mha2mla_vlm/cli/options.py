"""What the commands share: arguments, options, and how a result is printed."""

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from mha2mla_vlm.errors import InputError

LARGEST = 2**31 - 1  # of whole numbers: beyond, one library or another fails


class DType(StrEnum):
    """Number formats of weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class SplitName(StrEnum):
    """Which scans pages are made of."""

    train = "train"
    test = "test"


ModelArgument = Annotated[str, typer.Argument(help="A folder, a hub id, or zoo:NAME.", show_default=False)]
DataOption = Annotated[
    str,
    typer.Option(
        "--data", help="Chats: JSONL, LLaVA JSON, parquet, datasets folder, hub id.", show_default=False
    ),
]
SelectionOption = Annotated[
    str, typer.Option(help="high, low, uniform, 2-norm, mkl, rotation-kl or residual.")
]
FactorizationOption = Annotated[
    str,
    typer.Option(
        help="none, weight-svd, activation-svd, md-svd, centered, output-weighted, "
        "output-weighted-centered, split, only-key or only-value."
    ),
]
BudgetOption = Annotated[
    float | None, typer.Option(help="Share of the cache to keep, allotted over layers.  [default: 0.375]")
]
RopeDimOption = Annotated[
    int | None, typer.Option(help="R, rope dims kept per head, instead the same in every layer.")
]
LatentDimOption = Annotated[
    int | None, typer.Option(help="Latent dims per KV head, instead the same in every layer.")
]
FoldOption = Annotated[bool, typer.Option(help="Move the mean rotation of dropped pairs into the weights.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Foretell sizes, memory, disk and time, and stop.")
]
AdapterOption = Annotated[
    str | None,
    typer.Option(help="Adapter (LoRA, by peft) of the model to merge into it first.", show_default=False),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on where an earlier run to this output was interrupted.")
]
SpillOption = Annotated[
    Path | None, typer.Option(help="Folder for hidden states.  [default: beside the output]")
]
PushOption = Annotated[
    str | None, typer.Option(help="Repository of the hub to send the result to.", show_default=False)
]
OutputOption = Annotated[
    Path, typer.Option("--output", "-o", help="Folder to write; new or empty.", show_default=False)
]
CacheBitsOption = Annotated[
    int | None, typer.Option(help="8, 4 or 2: keep the cache in so many bits.  [default: as the weights]")
]
DTypeOption = Annotated[DType, typer.Option(help="Number format to run in; auto is the stored one.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]


def load_model(name: str, dtype: DType, device: str) -> tuple[Any, Any]:
    """A model and its processor."""
    from mha2mla_vlm.model.checkpoint import load, load_processor, pick_device

    target = pick_device(device)
    return load(name, dtype=dtype.value).to(target), load_processor(name)


def finish(result: dict[str, Any]) -> None:
    """Print a command's result, the last line on standard output."""
    try:
        print(json.dumps(result), flush=True)
    except OSError as error:
        # what could not be written would be tried again, and fail, as Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise InputError(f"standard output cannot be written to: {error.strerror}") from None
