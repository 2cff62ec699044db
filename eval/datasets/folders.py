"""What the files of a dataset say: lists of ids, folders, masks of label ids; and what a dataset is to a benchmark.

Nothing is read here but lists and folders; `eval.datasets.benchmarks` reads the samples and checks them.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image


VOID = 255  # in a mask: nothing is known there


def names_in(text: str) -> tuple[str, ...]:
    """Names between commas, as one would write them in a prompt."""
    return tuple(name.strip() for name in text.split(","))


@dataclass(frozen=True)
class OtherForm:
    """Another form in which a dataset's masks get around, whose ids would be read here as other classes without a word.

    Args:
        name: what was done to the masks.
        theirs: ids that masks of that form can hold.
        ours: ids that masks of the form that is read can hold.
        looks: whether a mask looks like one of that form, where all its ids are ours too; most masks of a set must.
    """

    name: str
    theirs: Set[int]
    ours: Set[int]
    looks: Callable[[np.ndarray], bool] = lambda ids: False

    def told_by(self, held: Set[int], masks: int, alike: int) -> bool:
        """Whether a set of `masks` is of that form, which hold these ids, and so many of which look so.

        It holds what ours cannot hold, and nothing that only ours can hold.
        """
        return bool(held & (self.theirs - self.ours) or 2 * alike > masks) and not held & (self.ours - self.theirs)


@dataclass(frozen=True)
class Layout:
    """The samples of one split.

    Args:
        classes: names as one would write them in a prompt, "background" the first where the labels have one.
        files: image and mask by id.
        decode: (id, path of a mask) to the ids that it holds, [H W], and what these mean: {id: index of a class, or VOID}.
            What that lacks is no id of the dataset. ValueError ("expected ..., but got ...") for a mask of another form.
        others: forms of masks that `decode` would take for its own.
    """

    classes: tuple[str, ...]
    files: dict[str, tuple[Path, Path]]
    decode: Callable[[str, Path], tuple[np.ndarray, Mapping[int, int]]]
    others: tuple[OtherForm, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """A dataset, and what is special about it.

    Args:
        layout: (root, split) to the split's files; None where samples are drawn.
        split: evaluated by default.
        released_split: that the released code of GoCA evaluates instead, where it does.
        append_missing: whether that code appends the classes that a caption misses.
        background_words: words for the background that it appends to captions.
        merged: classes that it counts as another one.
        phrases: lines of words for this dataset's classes, before the common ones of `eval.prompts.phrases`.
    """

    layout: Callable[[Path, str], Layout] | None
    split: str = "val"
    released_split: str | None = None
    append_missing: bool = False
    background_words: tuple[str, ...] = ()
    merged: Mapping[str, str] = field(default_factory=dict)
    phrases: str = ""


def one_channel(path: Path) -> np.ndarray:
    """The indices of a palette or greyscale mask, [H W]."""
    with Image.open(path) as file:
        values = np.asarray(file)
    if values.ndim != 2:
        raise ValueError(f"expected one channel of label ids, but got {values.shape[2]} channels")
    return values


def packed_colours(path: Path) -> np.ndarray:
    """R + 256 G + 65536 B of a mask in colours, [H W] int32."""
    with Image.open(path) as file:
        values = np.asarray(file)
    if values.ndim != 3 or values.shape[2] != 3:
        raise ValueError(f"expected a mask of three channels, but got an array of shape {values.shape}")
    return values.astype(np.int32) @ np.array([1, 256, 65536], np.int32)


def indexed(labels: Mapping[int, int]) -> Callable[[str, Path], tuple[np.ndarray, Mapping[int, int]]]:
    """`Layout.decode` for masks of one channel that hold the ids themselves."""
    return partial(_indexed, labels)


def _indexed(labels, id, path):
    return one_channel(path), labels


def base_folder(root: Path, *places: str, inside: str) -> Path:
    """The first of the places in the root that holds the folder `inside`, the root itself being the last."""
    bases = [root / place for place in places] + [root]
    found = next((base for base in bases if (base / inside).is_dir()), None)
    if found is None:
        raise ValueError(
            f"Expected a folder {inside} in {' or '.join(map(str, bases))}, but none is there. Give the "
            "folder that the dataset's archive unpacks to as root."
        )
    return found


def existing_folder(root: Path, *names: str) -> Path:
    """The first folder of these names that is there."""
    return _existing(root, names, Path.is_dir, "folder")


def existing_file(root: Path, *names: str) -> Path:
    """The first file of these names that is there."""
    return _existing(root, names, Path.is_file, "file")


def _existing(root, names, exists, kind) -> Path:
    found = next((root / name for name in names if exists(root / name)), None)
    if found is None:
        there = sorted(path.name for path in root.iterdir())[:10] if root.is_dir() else []
        raise ValueError(
            f"Expected the {kind} {' or '.join(names)} in {root}, but it is not there (there are: "
            f"{', '.join(there)}). Give the folder that the dataset's archives unpack to as root, or a split that is there."
        )
    return found


def split_folder(folder: Path, split: str) -> Path:
    """The split's folder, or the folder itself where it has files and no folders."""
    flat = folder.is_dir() and not any(path.is_dir() for path in folder.iterdir())
    return folder if flat else existing_folder(folder, split)


def listed(base: Path, *places: str) -> tuple[str, ...]:
    """The ids of a split list, the first word of each line."""
    path = existing_file(base, *places)
    return unique((line.split()[0] for line in path.read_text().splitlines() if line.strip()), f"in {path}")


def unique(ids: Iterable[str], where: str) -> tuple[str, ...]:
    """The ids, sorted; an id that comes twice is an error."""
    ordered = sorted(ids)
    if twice := sorted({a for a, b in pairwise(ordered) if a == b}):
        shown = ", ".join(twice[:5])
        raise ValueError(
            f"Expected every id once {where}, but {len(twice)} come twice: {shown}. Remove the repetitions."
        )
    return tuple(ordered)


def first_existing(*paths: Path) -> Path:
    """The first path that exists, or the first one: reading it will name it."""
    return next((path for path in paths if path.exists()), paths[0])
