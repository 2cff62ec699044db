"""TOML files to dataclasses. A file may include others, so that it holds only what is its own."""

import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from goca_guidance.schema import between, check_names, read


Seed = Annotated[int, between(0, 2**63 - 1)]


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
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
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


def from_file(cls: type, path: Path, **changes: Any):
    """A dataclass from a TOML file, with some fields changed; a mistake in it names the file."""
    values = read_toml(path) | changes
    with inside(path):
        return from_mapping(cls, values)


def from_mapping(cls: type, values: Mapping[str, Any]):
    """A dataclass from a table of a TOML file, each value read by its field's annotation (`goca_guidance.schema`).

    ValueError for a key that is no field, with the one that it may have been meant for, and for a value of another type.
    """
    check_keys(cls, values)
    hints = get_type_hints(cls, include_extras=True)
    with _as_value_error():
        return cls(**{name: read(name, value, hints[name]) for name, value in values.items()})


def check_keys(cls: type, values: Mapping[str, Any], others: tuple[str, ...] = ()) -> None:
    """ValueError for a key that is neither a field of `cls` nor one of the others, with the one that is spelled most alike."""
    with _as_value_error():
        check_names(values, {*(each.name for each in fields(cls)), *others}, f"a key of {cls.__name__}")


def checked_value(name: str, value: Any, hint: Any) -> Any:
    """One value of a TOML file, read by a type annotation; ValueError for another."""
    with _as_value_error():
        return read(name, value, hint)


@contextmanager
def inside(place: object) -> Iterator[None]:
    """A mistake in the block says where it stands: in a file, in a table of it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error


@contextmanager
def _as_value_error() -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        raise ValueError(str(error)) from error
