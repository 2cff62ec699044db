"""TOML files to dataclasses."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def from_mapping(cls: type, values: Mapping[str, Any]):
    """A dataclass from a table of a TOML file; an unknown key is an error that lists the known ones."""
    check_keys(cls, values)
    return cls(**values)


def check_keys(cls: type, values: Mapping[str, Any], others: tuple[str, ...] = ()) -> None:
    """ValueError for a key that is neither a field of `cls` nor one of the others."""
    known = {*(each.name for each in fields(cls)), *others}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"Expected keys of {cls.__name__} among {sorted(known)}, but got {unknown}.")
