"""Where the datasets keep images and masks: a function for each original layout, from folder and split to a Layout.

Nothing is read here but lists and folders; `eval.datasets.benchmarks` reads the samples and checks them.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat

from eval.datasets import labels
from eval.datasets.labels import VOID


@dataclass(frozen=True)
class Layout:
    """The samples of one split: `files` id -> (image, mask), `decode` (id, mask) -> ids [H W], {id: label or VOID}."""

    classes: tuple[str, ...]
    files: dict[str, tuple[Path, Path]]
    decode: Callable[[str, Path], tuple[np.ndarray, Mapping[int, int]]]


def voc(root: Path, split: str) -> Layout:
    """Pascal VOC 2012, 21 classes, 255 on outlines is VOID. The folder of `VOCdevkit`, of `VOC2012`, or this itself:

    JPEGImages/ID.jpg
    SegmentationClass/ID.png, or where that lacks the id SegmentationClassAug/ID.png (palette or greyscale: 0..20, 255)
    ImageSets/Segmentation/SPLIT.txt, or SPLIT.txt (an id in each line)
    """
    base = _base(root, "VOCdevkit/VOC2012", "VOC2012", inside="JPEGImages")
    masks = [base / name for name in ("SegmentationClass", "SegmentationClassAug")]
    _folder(base, *(mask.name for mask in masks))
    files = {
        id: (base / "JPEGImages" / f"{id}.jpg", _first(*(mask / f"{id}.png" for mask in masks)))
        for id in _listed(base, f"ImageSets/Segmentation/{split}.txt", f"{split}.txt")
    }
    return Layout(labels.VOC, files, partial(_indexed, labels.VOC_LABELS))


def context(root: Path, split: str, background: bool = True) -> Layout:
    """Pascal Context, the 59 frequent classes of 459, after background (every other id), or alone with the rest VOID.

    The folder of `VOCdevkit`, that of `VOC2010`, or this itself; what is Context's own may lie beside VOC2010 too.

    JPEGImages/ID.jpg
    trainval/ID.mat (MATLAB, LabelMap [H W] of 1..459), or as mmsegmentation converts it SegmentationClassContext/ID.png
    or SegmentationClass_Context/ID.png (0 = background)
    labels.txt (optional: lines of "id: name", compared with the ids that we know)
    ImageSets/SegmentationContext/SPLIT.txt, pascalcontext_SPLIT.txt, SPLIT.txt, ImageSets/Main/SPLIT.txt (the release:
    4998 train, 5105 val), or ImageSets/Segmentation/SPLIT.txt (964 each)
    """
    base = _base(root, "VOCdevkit/VOC2010", "VOC2010", inside="JPEGImages")
    _compare_names(_first(base / "labels.txt", root / "labels.txt"))
    names = ("trainval", "SegmentationClassContext", "SegmentationClass_Context")
    masks = _folder(base if any((base / name).is_dir() for name in names) else root, *names)
    ending = ".mat" if masks.name == "trainval" else ".png"
    lists = "ImageSets/SegmentationContext/* pascalcontext_* * ImageSets/Main/* ImageSets/Segmentation/*".split()
    ids = _listed(base, *(f"{place.replace('*', split)}.txt" for place in lists))
    files = {id: (base / "JPEGImages" / f"{id}.jpg", masks / f"{id}{ending}") for id in ids}
    return Layout(labels.CONTEXT[not background :], files, partial(_context_mask, background))


def coco_object(root: Path, split: str) -> Layout:
    """COCO-Object, 81 classes: background, and the 80 things of COCO 2017 panoptic in order of category id.

    annotations/panoptic_SPLIT2017.json
    annotations/panoptic_SPLIT2017/ID.png (segment id = R + 256 G + 65536 B, 0 = unlabelled)
    SPLIT2017/ID.jpg, or images/SPLIT2017/ID.jpg; the panoptic parts may lie at the top too

    Stuff and unlabelled pixels are background and nothing is VOID, as GroupViT made the benchmark. A crowd segment
    (iscrowd) names its category, so its pixels count as that class, as in detectron2's semantic masks; only the
    evaluation of instances ignores it.
    pycocotools' COCO cannot index this JSON: a panoptic annotation has no "id".
    """
    index = _file(root, f"annotations/panoptic_{split}2017.json", f"panoptic_{split}2017.json")
    masks = _folder(root, f"annotations/panoptic_{split}2017", f"panoptic_{split}2017")
    images = _folder(root, f"{split}2017", f"images/{split}2017")
    content = json.loads(index.read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    annotations = {Path(names[a["image_id"]]).stem: a for a in content["annotations"]}
    files = {id: (images / names[a["image_id"]], masks / a["file_name"]) for id, a in annotations.items()}
    segments = {id: a["segments_info"] for id, a in annotations.items()}
    return Layout(labels.COCO_OBJECT, files, partial(_panoptic, segments))


def coco_stuff(root: Path, split: str, coarse: bool = False) -> Layout:
    """COCO-Stuff 164k, 171 classes or the 27 supercategories; 255 (unlabelled) is VOID.

    stuffthingmaps/SPLIT2017/ID.png, or annotations/SPLIT2017/ID.png (0..181: the id of labels.txt less one)
    SPLIT2017/ID.jpg, or images/SPLIT2017/ID.jpg
    """
    masks = _folder(root, f"stuffthingmaps/{split}2017", f"annotations/{split}2017")
    images = _folder(root, f"{split}2017", f"images/{split}2017")
    files = {image.stem: (image, masks / f"{image.stem}.png") for image in images.glob("*.jpg")}
    if coarse:
        return Layout(labels.STUFF_27, files, partial(_indexed, labels.STUFF_27_LABELS))
    return Layout(labels.STUFF_171, files, partial(_indexed, labels.STUFF_171_LABELS))


def cityscapes(root: Path, split: str) -> Layout:
    """Cityscapes fine annotations, the 19 classes that are evaluated, all else VOID. An id is CITY_SEQUENCE_FRAME.

    leftImg8bit/SPLIT/CITY/ID_leftImg8bit.png
    gtFine/SPLIT/CITY/ID_gtFine_labelIds.png (0..33), or ID_gtFine_labelTrainIds.png (0..18, 255)

    A sample without the folders of split and city is read too.
    """
    images, masks, files = _folder(root, "leftImg8bit"), _folder(root, "gtFine"), {}
    for image in _split(images, split).rglob("*_leftImg8bit.png"):
        id = image.name.removesuffix("_leftImg8bit.png")
        start = masks / image.parent.relative_to(images) / f"{id}_gtFine"
        files[id] = (image, _first(*(Path(f"{start}_{kind}.png") for kind in ("labelIds", "labelTrainIds"))))
    return Layout(labels.CITYSCAPES, files, _cityscapes_mask)


def ade20k(root: Path, split: str) -> Layout:
    """ADE20K scene parsing, 150 classes; 0 (other) is VOID. The folder of `ADEChallengeData2016`, or this itself:

    images/training/ADE_train_N.jpg, images/validation/ADE_val_N.jpg
    annotations/training/ADE_train_N.png, annotations/validation/ADE_val_N.png (0..150)

    A sample without the folders of the splits is read too.
    """
    base = _base(root, "ADEChallengeData2016", inside="images")
    folder = {"train": "training", "val": "validation"}.get(split, split)
    images, masks = _split(base / "images", folder), _split(_folder(base, "annotations"), folder)
    files = {path.stem: (path, masks / f"{path.stem}.png") for path in images.glob(f"ADE_{split}_*.jpg")}
    return Layout(labels.ADE20K, files, partial(_indexed, labels.ADE20K_LABELS))


LAYOUTS: dict[str, Callable[[Path, str], Layout]] = {
    "voc": voc,
    "context": context,
    "context-59": partial(context, background=False),
    "coco-object": coco_object,
    "coco-stuff-27": partial(coco_stuff, coarse=True),
    "coco-stuff-171": coco_stuff,
    "cityscapes": cityscapes,
    "ade20k": ade20k,
}


def one_channel(path: Path) -> np.ndarray:
    """The indices of a palette or greyscale mask, [H W]."""
    with Image.open(path) as file:
        values = np.asarray(file)
    if values.ndim != 2:
        raise ValueError(f"expected one channel of label ids, but got {values.shape[2]} channels")
    return values


def _indexed(known, id, path):
    return one_channel(path), known


def _cityscapes_mask(id, path):
    trained = path.name.endswith("labelTrainIds.png")
    return one_channel(path), labels.CITYSCAPES_TRAIN_LABELS if trained else labels.CITYSCAPES_LABELS


def _context_mask(background, id, path):
    if path.suffix == ".mat":
        ids, known = loadmat(path)["LabelMap"], labels.CONTEXT_LABELS
    else:
        ids, known = one_channel(path), labels.CONTEXT_PNG_LABELS
    if background:
        return ids, known
    return ids, {k: v - 1 if 0 < v < VOID else VOID for k, v in known.items()}


def _panoptic(segments, id, path):
    with Image.open(path) as file:
        values = np.asarray(file)
    if values.ndim != 3 or values.shape[2] != 3:
        raise ValueError(f"expected a panoptic mask of three channels, but got an array of shape {values.shape}")
    ids = values.astype(np.int32) @ np.array([1, 256, 65536], np.int32)
    known = labels.COCO_OBJECT_LABELS
    return ids, {0: 0, **{s["id"]: known[s["category_id"]] for s in segments[id] if s["category_id"] in known}}


def _base(root: Path, *places: str, inside: str) -> Path:
    """The first of the places in the root that holds the folder `inside`, the root itself being the last."""
    bases = [root / place for place in places] + [root]
    found = next((base for base in bases if (base / inside).is_dir()), None)
    if found is None:
        raise ValueError(
            f"Expected a folder {inside} in {' or '.join(map(str, bases))}, but none is there. Give the "
            "folder that the dataset's archive unpacks to as root."
        )
    return found


def _folder(root: Path, *names: str) -> Path:
    return _existing(root, names, Path.is_dir, "folder")


def _file(root: Path, *names: str) -> Path:
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


def _split(folder: Path, split: str) -> Path:
    """The split's folder, or the folder itself where it has files and no folders."""
    flat = folder.is_dir() and not any(path.is_dir() for path in folder.iterdir())
    return folder if flat else _folder(folder, split)


def _listed(base: Path, *places: str) -> tuple[str, ...]:
    """The ids of a split list, the first word of each line."""
    path = _file(base, *places)
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


def _first(*paths: Path) -> Path:
    """The first path that exists, or the first one: reading it will name it."""
    return next((path for path in paths if path.exists()), paths[0])


def _compare_names(path: Path) -> None:
    """Pascal Context's labels.txt against the ids that we know, spaces aside; no file, no comparison."""
    lines = path.read_text().splitlines() if path.is_file() else []
    found = {int(id): name for id, _, name in (line.partition(":") for line in lines) if id.strip().isdigit()}
    expected = labels.CONTEXT_IDS if lines else {}
    for id, name in expected.items():
        if found.get(id, "").replace(" ", "") != name.replace(" ", ""):
            raise ValueError(
                f"Expected {id}: {name!r} in {path}, but got {found.get(id)!r}. It is not the list of the "
                "release's 459 labels, so its masks cannot be read; take labels.txt and trainval/ from the same release."
            )
