"""Files that are written whole or not at all, what stands for them, and what is told of one that is damaged."""

import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from goca_guidance import files
from goca_guidance.files import replacing as replacing


# ---- writing ---------------------------------------------------------------------------------------------------------
def recovered(path: Path) -> Path:
    """A folder that `replacing` wrote; where a kill left only the old one, that one is put back."""
    old = path.with_name(f".old-{path.name}")
    if old.is_dir() and not path.exists():
        old.replace(path)
    return path


def writable(path: Path) -> Path:
    """The path; ValueError where no file can be written there, so that it is known before hours are spent on what is in it."""
    if path.is_dir():
        raise ValueError(f"Expected the name of a file to write, but {path} is a folder: add a name.")
    place = next(folder for folder in path.absolute().parents if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        reason = "cannot be written to" if place.is_dir() else "is a file"
        raise ValueError(f"Expected a folder that {path} can be written to, but {place} {reason}: name another place.")
    return path


def write_json(path: Path, value) -> None:
    """Readable JSON, whole or not at all."""
    files.write_json(path, value, indent=1)


# ---- reading ---------------------------------------------------------------------------------------------------------
@contextmanager
def expecting(what: str, path: Path, advice: str) -> Iterator[None]:
    """ValueError, which names the file and says what to do, for whatever its content makes fail in the block.

    Parsers of damaged files raise anything; what the machine refuses (`OSError` with a number) passes as it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"Expected {what} in {path}, but got {reason}: {advice}.") from error


def intact(path: Path, read: Callable[[Path], Any]) -> Any:
    """What `read` makes of a file that a program keeps; None where there is none, or a damaged one, which is told."""
    if not path.exists():
        return None
    try:
        return read(path)
    except Exception as error:  # parsers of damaged files raise anything
        tqdm.write(f"{path} is damaged and is made again ({type(error).__name__}: {error})")
        return None


def file_digest(path: Path) -> str:
    """Digest of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def some(names: Collection[str]) -> str:
    """The first five names, and how many more there are."""
    first, more = list(names)[:5], len(names) - 5
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")
