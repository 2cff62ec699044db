"""The segmentation benchmarks, one type for all: `benchmark("voc", root)` gives classes, ids, and image and mask of an id.

The original layout that each one reads is written in its dataset's file beside this one; "scenes" and "scenes-animals"
are drawn and need no folder.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from eval.datasets import ade20k, cityscapes, coco, pascal
from eval.datasets.folders import VOID, Dataset, Layout, unique
from eval.scenes.scene import ANIMALS, CLASSES, SPLITS, scene


DATASETS: dict[str, Dataset] = {
    "voc": pascal.VOC_DATASET,
    "context": pascal.CONTEXT_DATASET,
    "context-59": pascal.CONTEXT_59_DATASET,
    "coco-object": coco.OBJECT_DATASET,
    "coco-stuff-27": coco.STUFF_27_DATASET,
    "coco-stuff-171": coco.STUFF_171_DATASET,
    "cityscapes": cityscapes.DATASET,
    "ade20k": ade20k.DATASET,
    "scenes": Dataset(None, split="test"),
    "scenes-animals": Dataset(None, split="test"),
}
SCENES = 1000  # how many scenes where no ids are given


class BadSample(ValueError):  # noqa: N818
    """A sample that cannot be evaluated: an image or a mask is missing, corrupt, wrongly sized, or has unknown ids."""


def no_words(id: str) -> tuple[str, ...]:
    """Where nothing is known of what an image shows beside its classes."""
    return ()


@dataclass(frozen=True)
class Benchmark:
    """Images with masks; `read(id)` gives an RGB image and its mask [H W] uint8: index into `classes`, or VOID.

    `classes` are names as one would write them in a prompt, "background" the first where the labels have one. `ids`
    are sorted and unique. `words(id)` are names of what the image shows beside its classes, where the dataset knows them.
    """

    name: str
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    read: Callable[[str], tuple[Image.Image, np.ndarray]]
    words: Callable[[str], tuple[str, ...]] = no_words

    @property
    def background(self) -> int | None:
        """The label of the background, where there is one."""
        return self.classes.index("background") if "background" in self.classes else None


def dataset_of(name: str) -> Dataset:
    """The dataset of a benchmark's name; ValueError for an unknown one."""
    if name not in DATASETS:
        raise ValueError(f"Expected a benchmark among {', '.join(DATASETS)}, but got {name!r}.")
    return DATASETS[name]


def benchmark(
    name: str, root: Path | None = None, split: str | None = None, ids: Sequence[str] | None = None
) -> Benchmark:
    """A benchmark by name, from the dataset's original folder.

    `split`: the dataset's own where none is given. `ids` keeps some: with or without the image file's ending.
    ValueError: unknown name, missing root, split folder or list, ids twice, ids without an image, no image at all.
    """
    dataset = dataset_of(name)
    if isinstance(ids, str):
        raise TypeError(f"Expected a sequence of ids, but got the string {ids!r}. Put it into a list.")
    if dataset.layout is None:
        return _scenes(name, root, split or dataset.split, ids)
    if root is None or not Path(root).is_dir():
        raise ValueError(
            f"Expected the folder of {name} as root, but got {root!s}, which is no folder. Give its path."
        )
    split = {"validation": "val", "training": "train"}.get(split, split) or dataset.split
    layout = dataset.layout(Path(root), split)
    if not layout.files:
        raise ValueError(
            f"Expected images in split {split!r} of {name} in {root}, but it is empty. Unpack the images there."
        )
    chosen = _chosen(ids, layout.files.__contains__, layout.files, f"split {split!r} of {name} in {root}")
    _refuse_other_forms(name, layout)
    kept = Layout(layout.classes, {id: layout.files[id] for id in chosen}, layout.decode)
    return Benchmark(name, layout.classes, chosen, partial(_read, kept))


def present(mask: np.ndarray) -> tuple[int, ...]:
    """The labels that occur in a mask, ascending, without VOID: the ground-truth tags of an image."""
    return tuple(label for label in np.unique(mask).tolist() if label != VOID)


def bare(id: str) -> str:
    """An image file's name without folder, extension and Cityscapes' "_leftImg8bit"."""
    name = Path(id).name
    for ending in (".jpg", ".jpeg", ".png", "_leftImg8bit"):
        name = name.removesuffix(ending)
    return name


def _chosen(ids: Iterable[str] | None, known: Callable[[str], bool], everything: Iterable[str], where: str):
    """The given ids, sorted, or everything; an id that is not known is an error, and so are none and repetitions."""
    if ids is None:
        return tuple(sorted(everything))
    chosen = unique(map(bare, ids), "among the given ids")
    if unknown := [id for id in chosen if not known(id)]:
        raise ValueError(
            f"Expected ids of {where}, but {len(unknown)} of {len(chosen)} have no image there: "
            f"{', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}. Give the split that holds them, "
            "or leave them out."
        )
    if not chosen:
        raise ValueError(f"Expected some ids of {where}, but got none. Leave ids out to take all.")
    return chosen


def _refuse_other_forms(name: str, layout: Layout) -> None:
    """ValueError where the split's masks are of another form, whichever of them are evaluated.

    Masks are read until one of them holds what only the dataset's own form holds: mostly the first few.
    """
    held, masks, waiting = set(), 0, [(form, 0) for form in layout.others]
    for id, (_, path) in layout.files.items():
        if not waiting:
            return
        try:
            ids, _ = layout.decode(id, path)
        except Exception:  # what cannot be read is told when its turn comes
            continue
        held, masks = held | {*np.unique(ids).tolist()}, masks + 1
        waiting = [(form, alike + form.looks(ids)) for form, alike in waiting if not held & (form.ours - form.theirs)]
    for form, alike in waiting:
        if form.told_by(held, masks, alike):
            foreign = sorted(held & (form.theirs - form.ours))[:5]
            raise ValueError(
                f"Expected the masks of {name} in their original form, but those in {path.parent} seem to be in another "
                f"({form.name}): some of {masks} hold {foreign or 'little else than 255'}, and none holds one of "
                f"{sorted(form.ours - form.theirs)[-5:]}. Take the masks of the release."
            )


def _scenes(name, root, split, ids) -> Benchmark:
    """Scenes of `eval.scenes`, 64 x 64, ids "000000" and so on, every pixel labelled.

    "scenes" has no background. In "scenes-animals" all but persons and animals is background, and has its words.
    """
    split = {"val": "validation", "training": "train"}.get(split, split)
    if root is not None:
        raise ValueError(f"Expected no root for scenes, which are drawn, but got {root!s}. Leave root out.")
    if split not in SPLITS:
        raise ValueError(f"Expected a split of scenes among {', '.join(SPLITS)}, but got {split!r}.")
    first = (f"{index:06d}" for index in range(SCENES))
    chosen = _chosen(ids, _is_scene, first, f"split {split!r} of scenes (000000 to 9999999)")
    classes = CLASSES if name == "scenes" else ("background", *ANIMALS)
    return Benchmark(name, classes, chosen, partial(_draw, split, classes), partial(_others, split, classes))


def _is_scene(id: str) -> bool:
    return id.isascii() and id.isdigit() and f"{int(id):06d}" == id and int(id) < 10_000_000


def _draw(split: str, classes: tuple[str, ...], id: str) -> tuple[Image.Image, np.ndarray]:
    """What is no class has label 0."""
    drawn = scene(split, int(id))
    labels = np.array([classes.index(name) if name in classes else 0 for name in CLASSES], np.uint8)
    return Image.fromarray(drawn.image), labels[drawn.mask]


def _others(split: str, classes: tuple[str, ...], id: str) -> tuple[str, ...]:
    return tuple(name for name in scene(split, int(id)).names if name not in classes)


def _read(layout: Layout, id: str) -> tuple[Image.Image, np.ndarray]:
    """Image and mask of one id, checked."""
    if id not in layout.files:
        raise ValueError(f"Expected one of the benchmark's {len(layout.files)} ids, but got {id!r}.")
    image_file, mask_file = layout.files[id]
    image = _opened("image", image_file, _rgb)
    ids, known = _opened("mask", mask_file, partial(layout.decode, id))
    if ids.shape != image.size[::-1]:
        raise BadSample(
            f"{mask_file}: expected a mask of height x width {image.height} x {image.width}, as {image_file} has, but "
            f"got {' x '.join(map(str, ids.shape))}. Take both files from the same release, or leave {id} out."
        )
    return image, _labelled(ids, known, mask_file)


def _opened(kind: str, path: Path, read: Callable[[Path], object]):
    """What `read` makes of a file. Parsers of broken files raise anything, so anything becomes a BadSample here."""
    if not path.is_file():
        raise BadSample(f"{path}: expected the {kind} there, but it is missing. Unpack it, or leave the id out.")
    try:
        return read(path)
    except Exception as error:
        raise BadSample(
            f"{path}: expected a whole {kind}, but got {type(error).__name__}: {error}. Unpack it again, or leave "
            "the id out."
        ) from error


def _rgb(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return file.convert("RGB")


def _labelled(ids: np.ndarray, known: Mapping[int, int], path: Path) -> np.ndarray:
    """Ids of a dataset as indices of classes, [H W] uint8."""
    values, places = np.unique(ids, return_inverse=True)
    if strange := [value for value in values.tolist() if value not in known]:
        raise BadSample(
            f"{path}: expected ids of the label set only, but got {strange[:5]} in {np.isin(ids, strange).sum()} "
            "pixels. Check that the mask is of this dataset and in its original form, or leave the id out."
        )
    return np.array([known[value] for value in values.tolist()], np.uint8)[places].reshape(ids.shape)
