"""TOML files to dataclasses. A file may include others, so that it holds only what is its own."""

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints


TYPES = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a table", list: "a list",
    NoneType: "left out",
}  # fmt: skip


def read_toml(path: Path, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file with what it includes: `include = "a.toml"` or a list of files, relative to this one.

    Of what stands in several files the later one prevails, and the file itself over all; tables are merged key by key.
    ValueError for an included file that is not there, for a circle, for what is no TOML.
    """
    if path.resolve() in including:
        circle = " -> ".join(str(each) for each in (*including[including.index(path.resolve()) :], path.resolve()))
        raise ValueError(f"Expected includes without a circle, but got {circle}: take one of them out.")
    if including and not path.is_file():
        raise ValueError(f"Expected the file {path}, as {including[-1]} includes it, but it is not there.")
    try:
        values = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"Expected well-formed TOML in {path}, but got: {error}.") from error
    names, merged = values.pop("include", []), {}
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"Expected `include` in {path} to be a file or a list of files, but got {names!r}.")
    for name in names:
        merged = _merged(merged, read_toml(path.parent / name, (*including, path.resolve())))
    return _merged(merged, values)


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(first[key], second[key]) for key in first.keys() & second.keys()
            if isinstance(first[key], dict) and isinstance(second[key], dict)}  # fmt: skip
    return {**first, **second, **both}


def from_mapping(cls: type, values: Mapping[str, Any]):
    """A dataclass from a table of a TOML file; an unknown key and a value of another type are errors."""
    check_keys(cls, values)
    check_types(cls, values)
    return cls(**values)


def check_keys(cls: type, values: Mapping[str, Any], others: tuple[str, ...] = ()) -> None:
    """ValueError, which lists the known ones, for a key that is neither a field of `cls` nor one of the others."""
    known = {*(each.name for each in fields(cls)), *others}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"Expected keys of {cls.__name__} among {sorted(known)}, but got {unknown}.")


def check_types(cls: type, values: Mapping[str, Any]) -> None:
    """ValueError for a value that is not of its field's type; whole numbers serve as floats, true and false as neither."""
    hints = get_type_hints(cls)
    for name, value in values.items():
        options = get_args(hints[name]) if isinstance(hints[name], UnionType) else (hints[name],)
        kinds = [get_origin(option) or option for option in options]
        fits = isinstance(value, tuple(kinds)) or (float in kinds and isinstance(value, int))
        if not fits or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(TYPES.get(kind, kind.__name__) for kind in kinds)
            raise ValueError(f"Expected `{name}` to be {wanted}, but got {value!r}.")
