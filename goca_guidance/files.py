"""Files and folders: written whole or not at all, found where a user points, and resumed after a kill."""

import base64
import glob
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


SUFFIXES = frozenset(".png .jpg .jpeg .webp .bmp .tif .tiff .gif .avif".split())
SETTINGS = "settings.json"
Format = Literal[
    "overlay", "labels", "masks", "cutouts", "coco", "scores"
]  # of a segmentation, see goca_guidance.formats


# ---- writing ---------------------------------------------------------------------------------------------------------
@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a temporary name and rename when whole, so that nothing half-written is ever taken for whole.

    What was begun is removed where it fails. A folder is replaced by a folder only: ValueError for a file in its place.
    """
    part, old = path.with_name(f".part-{path.name}"), path.with_name(f".old-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(part)
    try:
        yield part
        if path.is_dir() and not part.is_dir():
            raise ValueError(f"Expected {path} to be a file, or not to be there, but it is a folder: move it away.")
    except BaseException:
        _remove(part)
        raise
    if path.is_dir():
        path.replace(old)  # a folder is not replaced in one step: the old one steps aside until the new one is there
    part.replace(path)
    shutil.rmtree(old, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """JSON, whole or not at all; with an `indent` for people, ending in a new line."""
    end = "" if indent is None else "\n"
    with replacing(path) as part:
        part.write_bytes((json.dumps(value, indent=indent) + end).encode())


def inline(data: bytes, kind: str) -> str:
    """HTML of a picture that holds its own bytes; `kind` is png or gif."""
    return f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}"/>'


# ---- finding ---------------------------------------------------------------------------------------------------------
def pictures_in(asked: Sequence[str]) -> list[Path]:
    """The picture files that files, folders and globs name, each once; of a folder those in it, by their endings.

    What is no folder and no glob is a file, whether it is there or not: who reads it tells. ValueError for a folder or a glob
    without any.
    """
    found: dict[Path, None] = {}
    for each in asked:
        if glob.has_magic(each) and not Path(each).exists():
            paths = sorted(path for path in map(Path, glob.glob(each, recursive=True)) if _is_picture(path))
        elif Path(each).is_dir():
            paths = sorted(path for path in Path(each).iterdir() if _is_picture(path))
        else:
            paths = [Path(each)]
        if not paths:
            raise ValueError(
                f"Expected pictures in {each!r}, but it holds none with an ending of {', '.join(sorted(SUFFIXES))}."
            )
        found |= dict.fromkeys(paths)
    return list(found)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


# ---- results that are resumed ----------------------------------------------------------------------------------------
@dataclass
class Results:
    """A folder with one folder of results for each item, and a settings.json that says whose results they are.

    `names`: of each item the name of its folder. The settings are written with the first result: a mistake leaves nothing.
    Without settings it holds the results of one item, which replace whatever was there.
    """

    folder: Path
    names: Mapping[str, str]
    settings: Mapping[str, Any] | None = None
    _are_settings_written: bool = False

    @classmethod
    def of_several(cls, folder: Path, settings: Mapping[str, Any], wanted: Mapping[str, str]) -> "Results":
        """Results of items by the names wanted for their folders, or by those that an earlier run gave them.

        ValueError where the folder holds results of other settings.
        """
        settings = json.loads(json.dumps(settings))  # as they will be read
        names = _names_in(folder / SETTINGS, settings)
        for item, name in wanted.items():
            if item not in names:
                names[item] = _free(folder, name, names.values())
        return cls(folder, names, settings)

    def place(self, item: str) -> Path:
        return self.folder / self.names[item]

    def is_finished(self, item: str) -> bool:
        return self.settings is not None and self.place(item).is_dir()

    @contextmanager
    def writing(self, item: str) -> Iterator[Path]:
        """A folder to write an item's results into; one of several is there under its name once they are whole."""
        if self.settings is None:
            self.place(item).mkdir(parents=True, exist_ok=True)
            yield self.place(item)
            return
        if not self._are_settings_written:
            write_json(self.folder / SETTINGS, {"settings": self.settings, "names": self.names}, indent=1)
            self._are_settings_written = True
        with replacing(self.place(item)) as part:
            part.mkdir()
            yield part


def _names_in(file: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The names that an earlier run of these settings gave."""
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
        earlier, names = dict(found["settings"]), dict(found["names"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"Expected the settings of an earlier run in {file}, but it is damaged: name another folder."
        ) from None
    other = [key for key in {**earlier, **settings} if earlier.get(key) != settings.get(key)]
    if other:
        changes = ", ".join(f"{key} was {earlier.get(key)!r} and is {settings.get(key)!r}" for key in other)
        raise ValueError(
            f"Expected a new folder for results of other settings, but {file.parent} holds some ({changes}): name another "
            "--out, or remove it."
        )
    return names


def _free(folder: Path, name: str, taken: Iterable[str]) -> str:
    """The name, or the first one with a number behind it that is not taken, whatever its case, nor there."""
    used = {SETTINGS, *(each.casefold() for each in taken)}
    tried, number = name, 1
    while tried.casefold() in used or (folder / tried).exists():
        number += 1
        tried = f"{name}-{number}"
    return tried


def slug(text: str, longest: int = 40) -> str:
    """Letters and digits of a text, joined by hyphens, for the name of a file or a folder."""
    return re.sub(r"[\W_]+", "-", text)[:longest].strip("-") or "unnamed"
