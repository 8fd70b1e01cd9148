"""Versions of what this project needs, for the Makefile; needs nothing but Python and pip.

python scripts/versions.py newest EXTRA...   requirements without upper bounds
python scripts/versions.py oldest EXTRA...   requirements at their lower bounds
python scripts/versions.py installed FILE    write what is installed to a constraints file
python scripts/versions.py changes FILE      how what is installed differs from a constraints file
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.specifiers import SpecifierSet

PROJECT = "mha2mla-vlm"
# PyTorch pins these itself, to other versions on other platforms; the others come with Python
LEFT_OUT = re.compile(r"(nvidia|cuda)-|(triton|pip|setuptools|wheel|mha2mla-vlm)$")


def normalized(name: str) -> str:
    """A name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(*extras: str) -> Iterator[Requirement]:
    """Those of the project and of some of its extras, and of the extras that these name."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    for requirement in (Requirement(line) for lines in lists for line in lines):
        if requirement.name == PROJECT:
            yield from requirements(*sorted(requirement.extras))
        else:
            yield requirement


def newest(requirement: Requirement) -> Requirement:
    """The same without upper bounds."""
    kept = [str(bound) for bound in requirement.specifier if bound.operator == ">="]
    requirement.specifier = SpecifierSet(",".join(kept))
    return requirement


def oldest(requirement: Requirement) -> Requirement:
    """The same at its lower bound, if it has one."""
    least = [f"=={bound.version}" for bound in requirement.specifier if bound.operator == ">="]
    requirement.specifier = SpecifierSet(",".join(least))
    return requirement


def installed() -> dict[str, str]:
    """Versions by name, without what differs between platforms and without the project."""
    found = {normalized(each.metadata["Name"]): each.version.partition("+")[0] for each in distributions()}
    return {name: version for name, version in found.items() if not LEFT_OUT.match(name)}


def changes(path: str) -> Iterator[str]:
    """A line for each package whose installed version a constraints file does not have."""
    pinned = dict(line.split("==") for line in Path(path).read_text(encoding="utf-8").split())
    yield f"{'package':32}{path:24}installed"
    for name, version in sorted(installed().items()):
        if pinned.get(name) != version:
            yield f"{name:32}{pinned.get(name, '-'):24}{version}"


def main(command: str, *arguments: str) -> None:
    """Run a command."""
    if command == "installed":
        lines = sorted(f"{name}=={version}\n" for name, version in installed().items())
        Path(*arguments).write_text("".join(lines), encoding="utf-8")
    elif command == "changes":
        print("\n".join(changes(*arguments)))
    else:
        bound = {"newest": newest, "oldest": oldest}[command]
        print("\n".join(sorted({str(bound(requirement)) for requirement in requirements(*arguments)})))


if __name__ == "__main__":
    main(*sys.argv[1:])
