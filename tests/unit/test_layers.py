"""Packages import one way: each module only from packages below its own, as CONTRIBUTING.md draws them."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mha2mla_vlm

PACKAGE = "mha2mla_vlm"
SOURCE = Path(mha2mla_vlm.__file__).parent
FLOORS = (  # from the bottom; what shares a floor does not import each other
    ("errors",),
    ("strict",),
    ("config",),
    ("utils",),
    ("data",),
    ("algorithms",),
    ("model",),
    ("evaluation",),
    ("calibration",),
    ("conversion",),
    ("zoo",),
    ("training", "serving", "report", "bench"),
    ("demo",),
    ("cli",),
    ("__main__", "__init__"),
)
HEIGHT = {name: height for height, names in enumerate(FLOORS) for name in names}
UPWARD = {("cli.main", "__init__")}  # modules (from, to) that may: the version


def name_of(path):
    """A module's name below the package; a package's own is `NAME.__init__`."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


PATHS = {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}


def resolved(name):
    """The module that a dotted name below the package is, or is in."""
    while name:
        for module in (name, f"{name}.__init__"):
            if module in PATHS:
                return module
        name = name.rpartition(".")[0]
    return "__init__"


def imports(path):
    """Modules of ours that a module imports, at its top, within functions or for types only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (resolved(n[len(PACKAGE) + 1 :]) for n in names if f"{n}.".startswith(f"{PACKAGE}."))


IMPORTS = {name: sorted(set(imports(path))) for name, path in PATHS.items()}


def top(module):
    """The package, or the file beside the packages, that a module is in."""
    return module.partition(".")[0]


def test_every_module_has_a_place():
    assert {top(name) for name in PATHS} == set(HEIGHT)


@pytest.mark.parametrize("package", [name for names in FLOORS for name in names])
def test_no_import_goes_up(package):
    found = {
        (name, other)
        for name, others in IMPORTS.items()
        for other in others
        if top(name) == package and top(other) != package and HEIGHT[top(other)] >= HEIGHT[package]
    }
    assert found == {pair for pair in UPWARD if top(pair[0]) == package}


def parts():
    """Every package, with what each of its modules and packages imports of the others."""
    graphs = {}
    for name, others in IMPORTS.items():
        for other in others:
            mine, theirs = name.split("."), other.split(".")
            shared = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
            if shared is not None:
                graph = graphs.setdefault(".".join(mine[:shared]), {})
                graph.setdefault(mine[shared], set()).add(theirs[shared])
    return graphs


def test_the_imports_were_found():
    assert "model.checkpoint" in IMPORTS["__init__"]  # for types
    assert "model.attention" in IMPORTS["model.modeling"]
    assert "conversion.on_disk" in IMPORTS["cli.converting"]  # within a function
    assert {"", "model", "training"} <= parts().keys()


@pytest.mark.parametrize("package", sorted(parts()))
def test_no_circle_within_a_package(package):
    try:
        TopologicalSorter(parts()[package]).prepare()
    except CycleError as error:
        pytest.fail(f"{package or PACKAGE}: {' <- '.join(error.args[1])}")


def test_no_package_has_the_name_of_something_public():
    assert not set(mha2mla_vlm.__all__) & set(HEIGHT)  # importing it would hide what is public
