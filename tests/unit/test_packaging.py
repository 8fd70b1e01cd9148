"""What is imported is declared, and the files of versions agree with the declaration."""

import ast
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "mha2mla_vlm"
VERSIONS = runpy.run_path(str(ROOT / "scripts" / "versions.py"))
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}
UNDECLARED = {"triton", "flash_attn"}  # torch brings triton where it runs; flash_attn is timed if it is there
EXTRA_OF = {
    "serving/chat/page.py": "chat",
    "evaluation/lmms_eval/model.py": "eval",
    "serving/vllm/compat.py": "vllm",
}
EXTRAS = ("all", "vllm")


def declared(*extras):
    """Names of the distributions that the project and some extras ask for."""
    return {VERSIONS["normalized"](requirement.name) for requirement in VERSIONS["requirements"](*extras)}


def imported(tree, *, lazily):
    """Distributions that a module imports: when it is imported, or within functions."""
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    names = set()
    for node in ast.walk(tree):
        if (id(node) in inner) == lazily:
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module)
    packages = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - UNDECLARED
    return {VERSIONS["normalized"](DISTRIBUTIONS.get(name, name)) for name in packages} - {"mha2mla-vlm"}


def test_a_module_imports_at_once_only_what_is_always_installed():
    for path in SOURCE.rglob("*.py"):
        extra = EXTRA_OF.get(path.relative_to(SOURCE).as_posix())
        allowed = declared() if extra is None else declared(extra)
        assert imported(ast.parse(path.read_text(encoding="utf-8")), lazily=False) <= allowed, path


def test_what_is_imported_later_is_in_an_extra():
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert imported(tree, lazily=True) <= declared(*EXTRAS), path


def test_what_is_declared_is_imported():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")]
    used = set().union(*(imported(tree, lazily=lazily) for tree in trees for lazily in (False, True)))
    assert declared() - used == {"torchvision"}  # transformers' processors of images need it


def test_every_file_beside_the_modules_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    installed = {path for pattern in settings["package-data"]["mha2mla_vlm"] for path in SOURCE.glob(pattern)}
    files = {path for path in SOURCE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files == installed


def pinned(name):
    """Versions by package of a constraints file."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert lines == sorted(lines)
    assert all(re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+", line) for line in lines)
    return dict(line.split("==") for line in lines)


@pytest.mark.parametrize(
    ("name", "extras"),
    [
        ("constraints.txt", ("all", "dev", "docs", "libraries")),
        ("constraints-oldest.txt", ("dev",)),
        ("constraints-vllm.txt", ()),
    ],
)
def test_pinned_versions_are_within_the_bounds(name, extras):
    versions = pinned(name)
    for requirement in VERSIONS["requirements"](*extras):
        version = versions[VERSIONS["normalized"](requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}, {version}; make constraints"


def test_the_oldest_versions_are_the_lower_bounds():
    versions = pinned("constraints-oldest.txt")
    for requirement in VERSIONS["requirements"]("dev"):
        version = versions[VERSIONS["normalized"](requirement.name)]
        least = VERSIONS["oldest"](Requirement(str(requirement)))
        assert least.specifier.contains(version), f"{least}, {version}; make constraints"


def test_the_newest_versions_are_asked_for_without_upper_bounds():
    for requirement in VERSIONS["requirements"]("all", "dev"):
        assert "<" not in str(VERSIONS["newest"](requirement))
