"""Tiny folders in the original layout of each dataset, deterministic, with the truth that was written into them.

`miniature(name, root)` writes three images of 12 x 16 pixels (height x width) and gives {id: Truth}. The ids in the files
and what they stand for are facts by hand, so that nothing here depends on `eval.datasets.folders`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat


SIZE = (12, 16)

# id in the file -> index of the class, 255 where nothing is known
VOC = {0: 0, 1: 1, 12: 12, 20: 20, 255: 255}
CONTEXT = {1: 0, 2: 1, 25: 7, 308: 40, 459: 0, 458: 59}  # accordion, aeroplane, bird, potted plant, wool, wood
COCO_OBJECT = {0: 0, 1: 1, 13: 12, 90: 80, 118: 0, 199: 0}  # person, stop sign, toothbrush, wood floor, merged wall
STUFF_171 = {0: 0, 12: 11, 89: 79, 91: 80, 181: 170, 255: 255}  # person, stop sign, toothbrush, banner, wood
STUFF_27 = {0: 9, 12: 8, 89: 4, 91: 17, 181: 24, 255: 255}  # person, outdoor, indoor, textile, solid
CITYSCAPES = {0: 255, 4: 255, 7: 0, 8: 1, 26: 13, 33: 18}  # unlabelled, static, road, sidewalk, car, bicycle
ADE20K = {0: 255, 1: 0, 13: 12, 150: 149}  # other, wall, person, flag


@dataclass(frozen=True)
class Truth:
    """What a sample holds: `colour` [3] of all its pixels, `mask` [H W] of class indices, and its two files."""

    colour: np.ndarray
    mask: np.ndarray
    image: Path
    annotation: Path


def miniature(name: str, root: Path, split: str = "val") -> dict[str, Truth]:
    """Write the dataset of one benchmark into the folder `root`."""
    write, _ = _MINIATURES[name]
    return write(Path(root), split, np.random.default_rng(list(name.encode())))


def relist(path: Path, ids) -> None:
    """Write a split list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{id}\n" for id in ids))


def _write(samples, table, rng, save: Callable[[Path, np.ndarray], None]) -> dict[str, Truth]:
    """A one-coloured image and a mask of 4 x 4 blocks of random ids for each (id, image file, mask file)."""
    truths = {}
    for id, image, annotation in samples:
        colour = rng.integers(256, size=3).astype(np.uint8)
        blocks = rng.choice(list(table), size=(SIZE[0] // 4, SIZE[1] // 4))
        ids = np.kron(blocks, np.ones((4, 4), int))
        for path in (image, annotation):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.broadcast_to(colour, (*SIZE, 3)).copy()).save(image, quality=95)
        save(annotation, ids)
        truths[id] = Truth(colour, np.vectorize(table.get)(ids).astype(np.uint8), image, annotation)
    return truths


def _png(path: Path, ids: np.ndarray) -> None:
    Image.fromarray(ids.astype(np.uint8)).save(path)


def _palette(path: Path, ids: np.ndarray) -> None:
    picture = Image.fromarray(ids.astype(np.uint8))
    picture.putpalette([value for i in range(256) for value in (i, 255 - i, i // 2)])
    picture.save(path)


def _voc(root, split, rng):
    base, ids = root / "VOCdevkit" / "VOC2012", ("2007_000032", "2007_000039", "2008_000001")
    relist(base / "ImageSets" / "Segmentation" / f"{split}.txt", ids)
    samples = [(id, base / f"JPEGImages/{id}.jpg", base / f"SegmentationClass/{id}.png") for id in ids]
    return _write(samples, VOC, rng, _palette)


def _context(root, split, rng, table=CONTEXT):
    base, ids = root / "VOCdevkit" / "VOC2010", ("2008_000002", "2008_000003", "2009_000005")
    relist(base / "ImageSets" / "Main" / f"{split}.txt", ids)
    samples = [(id, base / f"JPEGImages/{id}.jpg", root / f"trainval/{id}.mat") for id in ids]
    truths = _write(samples, table, rng, lambda path, m: savemat(path, {"LabelMap": m.astype(np.uint16)}))
    (root / "labels.txt").write_text(CONTEXT_TXT)
    return truths


def _context_59(root, split, rng):
    return _context(root, split, rng, {id: (label - 1) % 256 for id, label in CONTEXT.items()})


def _coco_object(root, split, rng):
    """Each category of an image is one segment; ids above 65535 use all three channels. Persons are a crowd."""
    infos, images = [], []

    def save(path, categories):
        ids = np.where(categories > 0, categories * 70001, 0)
        Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(path)
        segments = [
            {"id": c * 70001, "category_id": c, "area": int((categories == c).sum()), "iscrowd": int(c == 1)}
            for c in np.unique(categories).tolist()
            if c
        ]
        number = int(path.stem)
        infos.append({"image_id": number, "file_name": path.name, "segments_info": segments})
        images.append({"id": number, "file_name": f"{path.stem}.jpg", "height": SIZE[0], "width": SIZE[1]})

    folder = root / "annotations" / f"panoptic_{split}2017"
    samples = [(id, root / f"{split}2017/{id}.jpg", folder / f"{id}.png") for id in _COCO_IDS]
    truths = _write(samples, COCO_OBJECT, rng, save)
    folder.with_suffix(".json").write_text(json.dumps({"images": images, "annotations": infos}))
    grey = truths[_COCO_IDS[0]]
    Image.open(grey.image).convert("L").save(grey.image, quality=95)
    truths[_COCO_IDS[0]] = Truth(np.repeat(Image.open(grey.image).getpixel((0, 0)), 3), grey.mask, *_paths(grey))
    return truths


def _paths(truth):
    return truth.image, truth.annotation


def _coco_stuff(root, split, rng, table=STUFF_171):
    samples = [(i, root / f"{split}2017/{i}.jpg", root / f"stuffthingmaps/{split}2017/{i}.png") for i in _COCO_IDS]
    return _write(samples, table, rng, _png)


def _coco_stuff_27(root, split, rng):
    return _coco_stuff(root, split, rng, STUFF_27)


def _cityscapes(root, split, rng):
    samples = []
    for id in ("frankfurt_000000_000294", "frankfurt_000001_000538", "lindau_000000_000019"):
        city = Path(split) / id.partition("_")[0]
        mask = root / "gtFine" / city / f"{id}_gtFine_labelIds.png"
        samples.append((id, root / "leftImg8bit" / city / f"{id}_leftImg8bit.png", mask))
    return _write(samples, CITYSCAPES, rng, _png)


def _ade20k(root, split, rng):
    base, folder = root / "ADEChallengeData2016", {"val": "validation", "train": "training"}[split]
    ids = [f"ADE_{split}_{number:08d}" for number in (1, 2, 3)]
    samples = [(id, base / f"images/{folder}/{id}.jpg", base / f"annotations/{folder}/{id}.png") for id in ids]
    return _write(samples, ADE20K, rng, _png)


_COCO_IDS = ("000000000139", "000000000285", "000000581781")
_MINIATURES = {  # its writer, and how many classes the dataset has
    "voc": (_voc, 21),
    "context": (_context, 60),
    "context-59": (_context_59, 59),
    "coco-object": (_coco_object, 81),
    "coco-stuff-171": (_coco_stuff, 171),
    "coco-stuff-27": (_coco_stuff_27, 27),
    "cityscapes": (_cityscapes, 19),
    "ade20k": (_ade20k, 150),
}
CLASS_COUNTS = {name: count for name, (_, count) in _MINIATURES.items()}
CONTEXT_TXT = (
    "1: accordion, 2: aeroplane, 9: bag, 18: bed, 19: bedclothes, 22: bench, 23: bicycle, 25: bird, 31: boat, 33: "
    "book, 34: bottle, 44: building, 45: bus, 46: cabinet, 59: car, 65: cat, 68: ceiling, 72: chair, 80: cloth, 85: "
    "computer, 98: cow, 104: cup, 105: curtain, 113: dog, 115: door, 144: fence, 158: floor, 159: flower, 162: "
    "food, 187: grass, 189: ground, 207: horse, 220: keyboard, 232: light, 258: motorbike, 259: mountain, 260: "
    "mouse, 284: person, 295: plate, 296: platform, 308: pottedplant, 324: road, 326: rock, 347: sheep, 349: "
    "shelves, 354: sidewalk, 355: sign, 360: sky, 366: snow, 368: sofa, 397: table, 415: track, 416: train, 420: "
    "tree, 424: truck, 427: tvmonitor, 440: wall, 445: water, 454: window, 458: wood, 459: wool"
).replace(", ", "\n")
