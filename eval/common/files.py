"""Files that are written whole or not at all, and what stands for them."""

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a temporary name and rename when whole, so that nothing half-written is ever taken for whole.

    What was begun is removed where the disk does not take it.
    """
    part = path.with_name(f".part-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if part.is_dir():
        shutil.rmtree(part)
    try:
        yield part
    except OSError:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)
        raise
    old = path.with_name(f".old-{path.name}")
    if path.is_dir():
        path.replace(old)  # a folder is not replaced in one step: the old one steps aside until the new one is there
    part.replace(path)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value) -> None:
    """Readable JSON, whole or not at all."""
    with replacing(path) as part:
        part.write_bytes((json.dumps(value, indent=1) + "\n").encode())


def file_digest(path: Path) -> str:
    """Digest of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def some(names: Collection[str]) -> str:
    """The first five names, and how many more there are."""
    first, more = list(names)[:5], len(names) - 5
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")
