"""The commands `mha2mla zoo ...`."""

from typing import Annotated

import typer

from mha2mla_vlm.cli.options import LARGEST, OutputOption, SplitName, finish

zoo_app = typer.Typer(
    help="The shipped small models, and their data.", no_args_is_help=True, rich_markup_mode=None
)


@zoo_app.command("list")
def zoo_list() -> None:
    """The shipped models."""
    from mha2mla_vlm.model.shipped import ZOO_NAMES, ZOO_PREFIX, zoo_path

    finish({"models": [{"name": ZOO_PREFIX + name, "path": str(zoo_path(name))} for name in ZOO_NAMES]})


@zoo_app.command("data")
def zoo_data(
    name: Annotated[str, typer.Argument(help="Name of a zoo model.", show_default=False)],
    output: OutputOption,
    split: Annotated[SplitName, typer.Option(help="Scans to draw from.")] = SplitName.test,
    samples: Annotated[int, typer.Option(min=1, max=LARGEST, help="Chats to write.")] = 500,
    seed: Annotated[int, typer.Option(help="Equal arguments write equal bytes.")] = 0,
) -> None:
    """Write chats about pages of handwritten digits as JSONL and PNG files."""
    from mha2mla_vlm.model.shipped import check_name
    from mha2mla_vlm.utils.folders import new_folder
    from mha2mla_vlm.zoo.chats import write_chats

    bare = check_name(name)
    with new_folder(output) as folder:
        path = write_chats(bare, folder, split=split.value, samples=samples, seed=seed)
    finish({"data": str(output / path.name), "records": samples, "split": split.value, "seed": seed})


@zoo_app.command("build")
def zoo_build(
    name: Annotated[str, typer.Argument(help="Name of a zoo model.", show_default=False)],
    output: OutputOption,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Time to train for, at most.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST, help="Seed of weights and data.")] = 0,
) -> None:
    """Train a zoo model from nothing; an interrupted run with the same output is resumed."""
    from mha2mla_vlm.model.shipped import check_name
    from mha2mla_vlm.utils.folders import claimed, put_in_place, writing
    from mha2mla_vlm.utils.progress import kept
    from mha2mla_vlm.zoo.recipe import Recipe, build, check_begun

    bare = check_name(name)
    with claimed(output) as path:
        partial = path.with_name(path.name + ".partial")
        check_begun(partial)
        on = "resume with the same command"
        with kept(partial, on), writing(partial, kept=f"; what is done is kept, {on}"):
            accuracy = build(bare, partial, Recipe(seed=seed, minutes=minutes))
            put_in_place(partial, path)
    finish({"output": str(output), **accuracy})
