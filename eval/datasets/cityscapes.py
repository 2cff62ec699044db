"""Cityscapes."""

from pathlib import Path

from eval.datasets.folders import (
    VOID,
    Dataset,
    Layout,
    OtherForm,
    existing_folder,
    first_existing,
    one_channel,
    split_folder,
)


# Cityscapes (Cordts et al., CVPR 2016), cityscapesScripts labels.py: the 19 classes that are evaluated, by label id
_CITYSCAPES_IDS = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
CITYSCAPES = tuple(_CITYSCAPES_IDS.values())
CITYSCAPES_LABELS = {
    **dict.fromkeys(range(34), VOID),
    **{id: index for index, id in enumerate(_CITYSCAPES_IDS)},
}
CITYSCAPES_TRAIN_LABELS = {**{i: i for i in range(19)}, 255: VOID}
OTHERS = {
    "labelIds": OtherForm("train ids", CITYSCAPES_TRAIN_LABELS.keys(), CITYSCAPES_LABELS.keys()),
    "labelTrainIds": OtherForm("label ids", CITYSCAPES_LABELS.keys(), CITYSCAPES_TRAIN_LABELS.keys()),
}


def cityscapes(root: Path, split: str) -> Layout:
    """Cityscapes fine annotations, the 19 classes that are evaluated, all else VOID. An id is CITY_SEQUENCE_FRAME.

    leftImg8bit/SPLIT/CITY/ID_leftImg8bit.png
    gtFine/SPLIT/CITY/ID_gtFine_labelIds.png (0..33), or ID_gtFine_labelTrainIds.png (0..18, 255)

    A sample without the folders of split and city is read too.
    """
    images, masks, files = existing_folder(root, "leftImg8bit"), existing_folder(root, "gtFine"), {}
    for image in split_folder(images, split).rglob("*_leftImg8bit.png"):
        id = image.name.removesuffix("_leftImg8bit.png")
        start = masks / image.parent.relative_to(images) / f"{id}_gtFine"
        files[id] = (image, first_existing(*(Path(f"{start}_{kind}.png") for kind in OTHERS)))
    kind = next(
        (kind for kind in OTHERS if any(mask.name.endswith(f"_{kind}.png") for _, mask in files.values())), None
    )
    return Layout(CITYSCAPES, files, _cityscapes_mask, (OTHERS[kind],) if kind else ())


def _cityscapes_mask(id, path):
    trained = path.name.endswith("labelTrainIds.png")
    return one_channel(path), CITYSCAPES_TRAIN_LABELS if trained else CITYSCAPES_LABELS


DATASET = Dataset(cityscapes)
