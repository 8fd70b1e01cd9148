"""The commands `mha2mla zoo ...`."""

from typing import Annotated

import typer

from mha2mla_vlm.cli.options import LARGEST, OutputOption, SplitName
from mha2mla_vlm.cli.results import Result, command
from mha2mla_vlm.cli.starting import starting
from mha2mla_vlm.model.shipped import ZOO_NAMES, ZOO_PREFIX, check_name, zoo_path

zoo_app = typer.Typer(
    help="The shipped small models, and their data.", no_args_is_help=True, rich_markup_mode="markdown"
)
ZooName = Annotated[
    str, typer.Argument(help="Name of a zoo model.", show_default=False, autocompletion=lambda: ZOO_NAMES)
]


@command(zoo_app, name="list")
def zoo_list() -> Result:
    """The shipped models."""
    models = [{"name": ZOO_PREFIX + name, "path": str(zoo_path(name))} for name in ZOO_NAMES]
    return Result({"models": models}, "\n".join(model["name"] for model in models))


@command(zoo_app, name="data")
def zoo_data(
    name: ZooName,
    output: OutputOption,
    split: Annotated[SplitName, typer.Option(help="Scans to draw from.")] = SplitName.test,
    samples: Annotated[int, typer.Option(min=1, max=LARGEST, help="Chats to write.")] = 500,
    seed: Annotated[int, typer.Option(help="Equal arguments write equal bytes.")] = 0,
) -> Result:
    """Write chats about pages of handwritten digits as JSONL and PNG files."""
    from mha2mla_vlm.utils.folders import new_folder

    with starting():
        from mha2mla_vlm.zoo.chats import write_chats

    bare = check_name(name)
    with new_folder(output) as folder:
        path = write_chats(bare, folder, split=split.value, samples=samples, seed=seed)
    return Result({"data": str(output / path.name), "records": samples, "split": split.value, "seed": seed})


@command(zoo_app, name="build")
def zoo_build(
    name: ZooName,
    output: OutputOption,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Time to train for, at most.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST, help="Seed of weights and data.")] = 0,
) -> Result:
    """Train a zoo model from nothing; an interrupted run with the same output is resumed."""
    from mha2mla_vlm.utils.folders import claimed, put_in_place, writing
    from mha2mla_vlm.utils.progress import kept

    with starting():
        from mha2mla_vlm.zoo.recipe import Recipe, build, check_begun

    bare = check_name(name)
    with claimed(output) as path:
        partial = path.with_name(path.name + ".partial")
        check_begun(partial)
        on = "resume with the same command"
        with kept(partial, on), writing(partial, kept=f"; what is done is kept, {on}"):
            accuracy = build(bare, partial, Recipe(seed=seed, minutes=minutes))
            put_in_place(partial, path)
    return Result({"output": str(output), **accuracy})
