"""The commands of fine-tuning."""

from typing import Annotated, Any

import typer
from rich.table import Table

from mha2mla_vlm.cli.options import DataOption, ModelArgument, OutputOption, mirrored, zoo_models
from mha2mla_vlm.cli.results import Result
from mha2mla_vlm.cli.starting import starting
from mha2mla_vlm.training.config import FinetuneConfig, read_recipe
from mha2mla_vlm.training.recipes import recipe_names, shipped_path
from mha2mla_vlm.utils.folders import check_output


@mirrored(FinetuneConfig)
def finetune(
    checkpoint: ModelArgument,
    data: DataOption,
    output: OutputOption,
    config: Annotated[
        str | None,
        typer.Option(
            help="Recipe: a YAML file, or one that ships, such as zoo/single_stage (all: `mha2mla recipes`); "
            "the options below go over it.",
            show_default=False,
            autocompletion=lambda: recipe_names(),
        ),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Chats to measure on; else some are held out.", show_default=False)
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Original to learn from; else the one it was converted from.",
            show_default=False,
            autocompletion=zoo_models,
        ),
    ] = None,
    **options: Any,
) -> Result | None:
    """Train a converted model on chats; an interrupted run is resumed where it stopped.

    Run it under `accelerate launch` for many processes.
    """
    check_output(output)
    recipe = read_recipe(config, **options)
    with starting():
        from mha2mla_vlm.training.run import finetune as finetune_model
        from mha2mla_vlm.training.run import is_main_process

    result = finetune_model(checkpoint, data, output, recipe, eval_data=eval_data, baseline=baseline)
    return Result(result) if is_main_process() else None


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Print only the path of this one: a plain line, for `$(mha2mla recipes NAME)`.",
            show_default=False,
            autocompletion=lambda: [*recipe_names(), *recipe_names(launch=True)],
        ),
    ] = None,
) -> Result | None:
    """List the recipes that ship, for `finetune --config`, and configs for `accelerate launch`."""
    if name is not None:
        print(shipped_path(name))
        return None
    kinds = {"recipes": recipe_names(), "accelerate": recipe_names(launch=True)}
    listed = {
        kind: [{"name": name, "path": str(shipped_path(name))} for name in names]
        for kind, names in kinds.items()
    }
    uses = {"recipes": "finetune --config", "accelerate": "accelerate launch --config_file"}
    table = Table("name", "for", box=None, pad_edge=False)
    for kind, names in kinds.items():
        for item in names:
            table.add_row(item, uses[kind])
    return Result(listed, table)
