"""The code that a checkpoint carries, so that it loads where only transformers is: these sources, flat.

With `trust_remote_code=True` transformers takes one file, and those beside it that are imported by
`from .NAME import`. So the modules that a converted model needs become `mha2mla_NAME.py`, without kernels and
other families. The entry file takes the installed package instead, where it can read the checkpoint.
"""

import ast
import functools
import re
from collections.abc import Sequence
from pathlib import Path

FORMAT = 1  # of checkpoints; a higher one for what older code cannot read
READS = (1,)  # formats
_PACKAGE = __name__.partition(".")[0]
_SOURCE = Path(__file__).parents[1]
_ROOT, _FAMILIES = "model.modeling", "model.families"
_STAND_INS = {"model.kernels": "model.no_kernels", "model.carried": "model.carried_on"}
_IMPORT = re.compile(rf"\bfrom {_PACKAGE}\.([\w.]+) import\b")
_ENTRY = '''"""For trust_remote_code=True: the classes of this model.

They are those of the package mha2mla-vlm, with its kernels, where one is installed that can read this
checkpoint, else of the modules beside this file, which need torch and transformers only.
"""

try:
    from {package}.model.carried import READS

    if {format} not in READS:
        raise ImportError("this checkpoint is of another version")
    from {package}.{root} import {names}
except ImportError:
    from .{flat_root} import family_classes

    {names} = family_classes("{family}")

__all__ = {listed}
'''


def write_code(folder: Path, entry: str, family: str, names: Sequence[str]) -> None:
    """Write the code that checkpoints of a `family` need, and `ENTRY.py`, which has its classes, `names`."""
    values = {"package": _PACKAGE, "root": _ROOT, "flat_root": _flat_name(_ROOT), "format": FORMAT}
    values |= {"names": ", ".join(names), "listed": list(names), "family": family}
    files = {f"{entry}.py": _ENTRY.format(**values)} | flat_modules(family)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


@functools.cache
def flat_modules(family: str) -> dict[str, str]:
    """Sources of the modules that a family's converted models need, by file; they import each other only."""
    others = {f"{_FAMILIES}.{path.stem}" for path in (_SOURCE / "model" / "families").glob("*.py")}
    others -= {f"{_FAMILIES}.{name}" for name in ("base", family)}
    found: dict[str, str] = {}
    waiting = [_ROOT]
    while waiting:
        module = waiting.pop()
        name = f"{_flat_name(module)}.py"
        if name not in found:
            path = _path(_STAND_INS.get(module, module))
            text = _without(path.read_text(encoding="utf-8"), others)
            waiting += _IMPORT.findall(text)
            origin = f"# {path.relative_to(_SOURCE.parent).as_posix()} of mha2mla-vlm, Apache-2.0\n"
            found[name] = origin + _IMPORT.sub(lambda match: f"from .{_flat_name(match[1])} import", text)
    return dict(sorted(found.items()))


def _path(module: str) -> Path:
    path = _SOURCE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _flat_name(module: str) -> str:
    return "mha2mla_" + module.replace(".", "_")


def _without(text: str, modules: set[str]) -> str:
    """A source without what it imports of these modules, and without the lines of a tuple that name it."""
    tree, dropped, names = ast.parse(text), set[int](), set[str]()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and str(node.module).removeprefix(f"{_PACKAGE}.") in modules:
            names.update(alias.asname or alias.name for alias in node.names)
            dropped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    parts = [part for each in ast.walk(tree) if isinstance(each, ast.Tuple) for part in each.elts]
    dropped.update(part.lineno for part in parts if isinstance(part, ast.Name) and part.id in names)
    lines = enumerate(text.splitlines(keepends=True), 1)
    return "".join(line for number, line in lines if number not in dropped)
