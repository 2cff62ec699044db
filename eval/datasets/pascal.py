"""Pascal VOC 2012 and Pascal Context."""

from functools import partial
from pathlib import Path

from scipy.io import loadmat

from eval.datasets.folders import (
    VOID,
    Dataset,
    Layout,
    OtherForm,
    base_folder,
    existing_folder,
    first_existing,
    indexed,
    listed,
    names_in,
    one_channel,
)


# Pascal VOC 2012, devkit section 2: ids 0..20, and 255 along outlines
VOC = names_in(
    "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table, dog, horse, "
    "motorbike, person, potted plant, sheep, sofa, train, tv monitor"
)
VOC_LABELS = {**{i: i for i in range(21)}, 255: VOID}
_VOC_GREY = {0, 15, 19, 34, 38, 52, 53, 57, 72, 75, 76, 90, 94, 109, 113, 128, 133, 147, 151, 220}
VOC_OTHERS = (
    OtherForm("the palette's colours as grey", _VOC_GREY, VOC_LABELS.keys()),
    OtherForm(
        "reduced: 255 for background, and all ids one less", {*range(20), 255}, VOC_LABELS.keys(),
        lambda ids: not (ids == 0).any() and (ids == 255).mean() > 0.5,
    ),
)  # fmt: skip


def voc(root: Path, split: str) -> Layout:
    """Pascal VOC 2012, 21 classes, 255 on outlines is VOID. The folder of `VOCdevkit`, of `VOC2012`, or this itself:

    JPEGImages/ID.jpg
    SegmentationClass/ID.png, or where that lacks the id SegmentationClassAug/ID.png (palette or greyscale: 0..20, 255)
    ImageSets/Segmentation/SPLIT.txt, or SPLIT.txt (an id in each line)
    """
    base = base_folder(root, "VOCdevkit/VOC2012", "VOC2012", inside="JPEGImages")
    masks = [base / name for name in ("SegmentationClass", "SegmentationClassAug")]
    existing_folder(base, *(mask.name for mask in masks))
    files = {
        id: (base / "JPEGImages" / f"{id}.jpg", first_existing(*(mask / f"{id}.png" for mask in masks)))
        for id in listed(base, f"ImageSets/Segmentation/{split}.txt", f"{split}.txt")
    }
    return Layout(VOC, files, indexed(VOC_LABELS), VOC_OTHERS)


# Pascal Context (Mottaghi et al., CVPR 2014): the 59 frequent classes in alphabetical order, by their ids among the
# 459 of its labels.txt. Every other id is background.
CONTEXT_IDS = {
    2: "aeroplane", 9: "bag", 18: "bed", 19: "bedclothes", 22: "bench", 23: "bicycle", 25: "bird", 31: "boat",
    33: "book", 34: "bottle", 44: "building", 45: "bus", 46: "cabinet", 59: "car", 65: "cat", 68: "ceiling",
    72: "chair", 80: "cloth", 85: "computer", 98: "cow", 104: "cup", 105: "curtain", 113: "dog", 115: "door",
    144: "fence", 158: "floor", 159: "flower", 162: "food", 187: "grass", 189: "ground", 207: "horse",
    220: "keyboard", 232: "light", 258: "motorbike", 259: "mountain", 260: "mouse", 284: "person", 295: "plate",
    296: "platform", 308: "potted plant", 324: "road", 326: "rock", 347: "sheep", 349: "shelves", 354: "sidewalk",
    355: "sign", 360: "sky", 366: "snow", 368: "sofa", 397: "table", 415: "track", 416: "train", 420: "tree",
    424: "truck", 427: "tv monitor", 440: "wall", 445: "water", 454: "window", 458: "wood",
}  # fmt: skip
CONTEXT = ("background", *CONTEXT_IDS.values())
CONTEXT_LABELS = {**dict.fromkeys(range(460), 0), **{id: index for index, id in enumerate(CONTEXT_IDS, start=1)}}
CONTEXT_PNG_LABELS = {**{i: i for i in range(60)}, 255: VOID}  # the converted form of mmsegmentation
CONTEXT_OTHERS = {
    ".mat": (OtherForm("converted to 0 (background) and 59 classes", {*range(60)}, {*range(1, 460)}),),
    ".png": (
        OtherForm("reduced: 255 for background, and all ids one less", {*range(59), 255}, {*range(60)}),
        OtherForm("the release's 459 ids", {*range(1, 460)}, {*range(60)}),
    ),
}


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
    base = base_folder(root, "VOCdevkit/VOC2010", "VOC2010", inside="JPEGImages")
    _compare_names(first_existing(base / "labels.txt", root / "labels.txt"))
    names = ("trainval", "SegmentationClassContext", "SegmentationClass_Context")
    masks = existing_folder(base if any((base / name).is_dir() for name in names) else root, *names)
    ending = ".mat" if masks.name == "trainval" else ".png"
    lists = "ImageSets/SegmentationContext/* pascalcontext_* * ImageSets/Main/* ImageSets/Segmentation/*".split()
    ids = listed(base, *(f"{place.replace('*', split)}.txt" for place in lists))
    files = {id: (base / "JPEGImages" / f"{id}.jpg", masks / f"{id}{ending}") for id in ids}
    return Layout(CONTEXT[not background :], files, partial(_context_mask, background), CONTEXT_OTHERS[ending])


def _context_mask(background, id, path):
    if path.suffix == ".mat":
        ids, known = loadmat(path)["LabelMap"], CONTEXT_LABELS
    else:
        ids, known = one_channel(path), CONTEXT_PNG_LABELS
    if background:
        return ids, known
    return ids, {k: v - 1 if 0 < v < VOID else VOID for k, v in known.items()}


def _compare_names(path: Path) -> None:
    """Pascal Context's labels.txt against the ids that we know, spaces aside; no file, no comparison."""
    lines = path.read_text().splitlines() if path.is_file() else []
    found = {int(id): name for id, _, name in (line.partition(":") for line in lines) if id.strip().isdigit()}
    expected = CONTEXT_IDS if lines else {}
    for id, name in expected.items():
        if found.get(id, "").replace(" ", "") != name.replace(" ", ""):
            raise ValueError(
                f"Expected {id}: {name!r} in {path}, but got {found.get(id)!r}. It is not the list of the "
                "release's 459 labels, so its masks cannot be read; take labels.txt and trainval/ from the same release."
            )


VOC_DATASET = Dataset(voc, released_split="train", append_missing=True, background_words=("background",))
CONTEXT_DATASET = Dataset(context, released_split="train", append_missing=True)
CONTEXT_59_DATASET = Dataset(partial(context, background=False), append_missing=True)
