"""What configurations have in common: frozen, keyword-only dataclasses that reject what they do not know."""

from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Self, cast, get_args, get_origin

from mha2mla_vlm.errors import InputError, shown

_KIND_NAMES = {
    NoneType: "nothing",
    bool: "true or false",
    str: "text",
    int: "a whole number",
    float: "a number",
}


def option(default: Any, text: str, known: Iterable[str] = ()) -> Any:
    """A field with its line of help, which the command line shows too, and values that it is completed to."""
    return field(default=default, metadata={"help": text, "known": tuple(known)})


@dataclass(frozen=True, kw_only=True)
class Strict:
    """A dataclass that is read from a mapping and rejects keys that it does not know."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read from a mapping; raises `InputError` for unknown and for missing keys."""
        if not isinstance(values, dict):
            raise InputError(f"{cls.__name__} must be a mapping, not {shown(values)}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(map(str, set(values) - known)):
            listed = ", ".join(unknown)[:200]
            raise InputError(f"unknown key(s) {listed} in {cls.__name__}; known: {', '.join(sorted(known))}")
        needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        if missing := sorted(needed - set(values)):
            raise InputError(f"missing key(s) {', '.join(missing)} in {cls.__name__}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def check_types(config: Any) -> None:
    """Raise `InputError` for a field whose value is not of its declared type; a whole number is a float too.

    YAML reads `1e-5` as text and `yes` as true.
    """
    for item in fields(config):
        value, declared = getattr(config, item.name), cast(Any, item.type)
        if not _fits(value, declared):
            kinds = get_args(declared) if get_origin(declared) is UnionType else (declared,)
            wanted = " or ".join(_KIND_NAMES.get(kind, str(kind)) for kind in kinds)
            hint = "; write 1.0e-5 for 1e-5" if float in kinds and isinstance(value, str) else ""
            raise InputError(f"{item.name} = {shown(value)}: give {wanted}{hint}")


def _fits(value: Any, declared: Any) -> bool:
    kind, inner = get_origin(declared) or declared, get_args(declared)
    if kind is UnionType:
        return any(_fits(value, each) for each in inner)
    if kind is dict:
        return isinstance(value, dict) and all(
            _fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items()
        )
    if kind in (list, tuple):
        return isinstance(value, kind) and all(_fits(each, inner[0]) for each in value)
    return kind is Any or type(value) is kind or (kind is float and type(value) is int)
