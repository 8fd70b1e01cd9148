"""Recipes that ship with the package, by name: stages of fine-tuning, and configs of `accelerate launch`."""

from pathlib import Path

from mha2mla_vlm.errors import InputError, shown_path

FOLDER = Path(__file__).parents[1] / "recipes"
ACCELERATE = "accelerate/"  # begins the names that `accelerate launch` reads, not `finetune`


def recipe_names(*, launch: bool = False) -> list[str]:
    """Names of the recipes of `finetune`, or of the configs of `accelerate launch`."""
    names = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))
    return [name for name in names if name.startswith(ACCELERATE) == launch]


def shipped_path(name: str) -> Path:
    """The file of a shipped recipe or config; raises `InputError` if there is none of this name."""
    known = [*recipe_names(), *recipe_names(launch=True)]
    if name not in known:
        raise InputError(f"no recipe {shown_path(name)}; there are: {', '.join(known)}")
    return FOLDER / f"{name}.yaml"


def find_recipe(name: str | Path) -> Path:
    """The file that `--config` names: a path, or a shipped recipe; raises `InputError` if it is neither."""
    path = Path(name)
    if path.exists():
        return path
    if str(name) not in recipe_names():
        known = ", ".join(recipe_names())
        raise InputError(
            f"the recipe {shown_path(name)} does not exist; give a YAML file, or one of: {known}"
        )
    return shipped_path(str(name))
