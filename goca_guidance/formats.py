"""What a segmentation is written as: a picture to look at, label maps, masks, cut-outs, COCO's run lengths, scores."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from goca_guidance.files import Format, replacing, slug, write_json


if TYPE_CHECKING:
    import goca_guidance.pictures


@dataclass(frozen=True)
class Segmented:
    """One image of a segmentation: an RGB picture, its label map H W, and the scores k h w of its classes at the working size.

    `has_background`: the last of the `classes` is what is none of the others, and has no scores. `name`: of the image's file.
    """

    picture: Image.Image
    labels: Int[Tensor, "_ _"]
    classes: tuple[str, ...]
    scores: Float[Tensor, "_ _ _"]
    has_background: bool
    name: str

    def mask(self, index: int) -> Bool[np.ndarray, "_ _"]:
        return (self.labels == index).numpy()

    def objects(self) -> list[tuple[int, str]]:
        """Index and name of the classes that occur, but for the background."""
        present = set(self.labels.unique().tolist())
        named = self.classes[: len(self.classes) - self.has_background]
        return [(index, name) for index, name in enumerate(named) if index in present]


def write(one: Segmented, folder: Path, formats: Iterable[Format]) -> None:
    """Write an image's files into a folder, each to a temporary name and renamed."""
    check(formats)
    for each in formats:
        WRITERS[each](one, folder)


def check(formats: Iterable[Format]) -> None:
    """ImportError where a format asks for a package that is not installed."""
    if "coco" in formats and find_spec("pycocotools") is None:
        raise ImportError(
            'Expected pycocotools for the format coco, but it is not installed: pip install "goca-guidance[coco]".'
        )


# ---- the formats -----------------------------------------------------------------------------------------------------
def overlay(one: Segmented) -> "goca_guidance.pictures.Drawing":
    """The picture, and beside it the label map painted over it, with a legend."""
    from goca_guidance import pictures

    return pictures.overlay(pictures.enlarged(one.picture), [one.labels], one.classes, ["segmentation"])


def _overlay(one, folder):
    """overlay.png, to look at."""
    _save(overlay(one), folder / "overlay.png")


def _labels(one, folder):
    """labels.png, a palette picture whose pixels are indices, and classes.txt, whose lines are the names of these."""
    from goca_guidance import pictures  # here, because matplotlib takes its time

    _save(pictures.index_image(one.labels), folder / "labels.png")
    with replacing(folder / "classes.txt") as part:
        part.write_text("".join(f"{_line(name)}\n" for name in one.classes), encoding="utf-8")


def _masks(one, folder):
    """masks/INDEX-NAME.png, white where the class is; of every class, the background too."""
    for index, name in enumerate(one.classes):
        _save(Image.fromarray(one.mask(index)).convert("L"), folder / "masks" / _file(index, name))


def _cutouts(one, folder):
    """cutouts/INDEX-NAME.png, the picture with everything else transparent; of the classes that occur."""
    for index, name in one.objects():
        cut = one.picture.copy()
        cut.putalpha(Image.fromarray(one.mask(index)).convert("L"))
        _save(cut, folder / "cutouts" / _file(index, name))


def _coco(one, folder):
    """coco.json, a COCO data set of one image: a compressed run-length mask of each class that occurs."""
    from pycocotools import mask as rle

    height, width = one.labels.shape
    annotations = []
    for index, _ in one.objects():
        encoded = rle.encode(np.asfortranarray(one.mask(index), dtype=np.uint8))
        annotations.append({
            "id": len(annotations) + 1, "image_id": 1, "category_id": index + 1, "iscrowd": 0, "area": int(rle.area(encoded)),
            "bbox": rle.toBbox(encoded).tolist(), "segmentation": {**encoded, "counts": encoded["counts"].decode()},
        })  # fmt: skip
    named = one.classes[: len(one.classes) - one.has_background]
    image = {"id": 1, "file_name": one.name, "width": width, "height": height}
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(named)]
    write_json(folder / "coco.json", {"images": [image], "categories": categories, "annotations": annotations})


def _scores(one, folder):
    """scores.npz: `scores` k h w at the working size, `classes` k of them, and the image's `size`, height and width."""
    names = np.array(one.classes[: one.scores.shape[0]])
    with replacing(folder / "scores.npz") as part, part.open("wb") as file:
        np.savez_compressed(file, scores=one.scores.cpu().numpy(), classes=names, size=one.labels.shape)


WRITERS: dict[Format, Callable[[Segmented, Path], None]] = {
    "overlay": _overlay,
    "labels": _labels,
    "masks": _masks,
    "cutouts": _cutouts,
    "coco": _coco,
    "scores": _scores,
}


def _save(picture, path):
    from goca_guidance import pictures

    pictures.save(picture, path)


def _line(name: str) -> str:
    return " ".join(name.split())


def _file(index: int, name: str) -> str:
    """A file's name for a class, whatever the class is called."""
    return f"{index}-{slug(name)}.png"


# ---- COCO ------------------------------------------------------------------------------------------------------------
def joined_coco(datasets: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """COCO data sets of one image and the same categories as one."""
    images: list[dict] = []
    annotations: list[dict] = []
    categories: list[dict] = []
    for number, dataset in enumerate(datasets, 1):
        images += [{**image, "id": number} for image in dataset["images"]]
        annotations += [
            {**each, "id": len(annotations) + place, "image_id": number}
            for place, each in enumerate(dataset["annotations"], 1)
        ]
        categories = dataset["categories"]
    return {"images": images, "categories": categories, "annotations": annotations}
