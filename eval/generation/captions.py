"""Captions to generate images for, by image id: those of COCO from a CSV file, or those of Scenes."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.common.files import some
from eval.scenes.scene import scene


COLUMNS = "image_id", "text"


def captions_of(source: str, split: str, count: int) -> dict[str, str]:
    """Captions by id: the first `count` of a split of "scenes", or all of a CSV file."""
    return scenes_captions(split, count) if source == "scenes" else coco_captions(Path(source).expanduser())


def scenes_captions(split: str, count: int) -> dict[str, str]:
    """Captions of the first scenes of a split; ids are their numbers, of six digits."""
    return {f"{number:06d}": scene(split, number).caption for number in range(count)}


def coco_captions(path: Path) -> dict[str, str]:
    """Captions of a CSV file with the columns image_id and text, as they stand there, sorted by id.

    ValueError, which names some of them: rows with too many or too few fields, ids that are no whole numbers or stand twice.
    Empty captions are kept: what to do about them is the reader's to say.
    """
    rows = _rows(path)
    lines = [f"line {line}" for line, row in rows if None in row or None in row.values()]
    _refuse(path, "rows of as many fields as the header", lines)
    ids = [row["image_id"].strip() for _, row in rows]
    _refuse(path, "whole numbers for image_id", [repr(name) for name in ids if not _is_number(name)])
    ids = [str(int(name)) for name in ids]
    _refuse(path, "one row for each image_id", [f"{name} ({n} times)" for name, n in Counter(ids).items() if n > 1])
    found = dict(zip(ids, (row["text"] for _, row in rows), strict=True))
    return {name: found[name] for name in sorted(found, key=int)}


def digest_of(captions: Mapping[str, str]) -> str:
    """sha256 of ids and captions in their order."""
    return hashlib.sha256(json.dumps(list(captions.items())).encode()).hexdigest()


def _rows(path: Path) -> list[tuple[int, dict]]:
    """Every row with the line on which it ends; a caption may run over several lines."""
    if not path.is_file():
        raise ValueError(f'Expected "scenes" or a CSV file of captions, but {str(path)!r} is no file.')
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            names = reader.fieldnames or []
            rows = [(reader.line_num, row) for row in reader]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"Expected a CSV file in UTF-8, but {path} is broken after line {reader.line_num}: {error}."
            ) from error
    if missing := sorted(set(COLUMNS) - set(names)):
        raise ValueError(
            f"Expected the columns {', '.join(COLUMNS)} in {path}, but {', '.join(missing)} is not among {names}."
        )
    if not rows:
        raise ValueError(f"Expected at least one caption in {path}, but got none.")
    return rows


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 19


def _refuse(path: Path, expected: str, mistakes: Sequence[str]) -> None:
    if mistakes:
        raise ValueError(f"Expected {expected} in {path}, but got {some(mistakes)}.")
