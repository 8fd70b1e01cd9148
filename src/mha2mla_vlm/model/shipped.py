"""Names and folders of the models that ship with the package (`zoo`)."""

from pathlib import Path

from mha2mla_vlm.errors import InputError

ZOO_PREFIX = "zoo:"
ZOO_FOLDER = Path(__file__).parents[1] / "zoo" / "models"
ZOO_NAMES = ("qwen2_5_vl", "llava_next", "llava", "qwen3_vl")


def check_name(name: str) -> str:
    """Return `name` without the `zoo:` prefix; raise `InputError` if there is no such model."""
    bare = name.removeprefix(ZOO_PREFIX)
    if bare not in ZOO_NAMES:
        raise InputError(f"no zoo model {name!r}; there are: {', '.join(ZOO_PREFIX + n for n in ZOO_NAMES)}")
    return bare


def zoo_path(name: str) -> Path:
    """Folder of a shipped model, by its name with or without the `zoo:` prefix."""
    bare = check_name(name)
    path = ZOO_FOLDER / bare
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is missing from this installation; build it with: mha2mla zoo build {bare}")
    return path
