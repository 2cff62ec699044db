"""Label tables and readers of the benchmarks against areas and names that others wrote, and what was seen by eye."""

import json
import shutil
from itertools import permutations

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from torchvision.datasets import Cityscapes

from eval.datasets.benchmarks import bare, benchmark, present
from eval.datasets.coco import COCO_OBJECT_LABELS, STUFF_27, STUFF_27_LABELS, STUFF_171, STUFF_171_LABELS
from eval.datasets.folders import VOID
from eval.datasets.pascal import CONTEXT_IDS
from tests.helpers.places import shared


def captions(name: str) -> list[str]:
    return list(json.loads((shared("goca_labels") / name).read_text()))


def test_counts_of_the_tables():
    absent = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}  # of COCO's 91 things
    assert {id + 1 for id in STUFF_171_LABELS} == set(range(1, 183)) - absent | {256}
    assert STUFF_27_LABELS.keys() == STUFF_171_LABELS.keys()
    assert set(STUFF_27_LABELS.values()) == {*range(27), VOID}
    assert len(CONTEXT_IDS) == 59
    assert list(CONTEXT_IDS.values()) == sorted(CONTEXT_IDS.values())
    assert len(COCO_OBJECT_LABELS) == 133
    assert sorted(COCO_OBJECT_LABELS.values()) == [0] * 53 + list(range(1, 81))


def test_supercategories_as_the_panoptic_json_has_them():
    """All 80 things, and the 36 stuff classes that panoptic did not merge: name and supercategory as published."""
    categories = json.loads((shared("panopticapi_sample") / "panoptic_coco_categories.json").read_text())
    assert {c["id"] for c in categories} == set(COCO_OBJECT_LABELS)
    assert {c["id"] for c in categories if c["isthing"]} == {id for id, label in COCO_OBJECT_LABELS.items() if label}
    plain = [c for c in categories if c["id"] < 184]
    assert len(plain) == 116
    for category in plain:
        coarse = STUFF_27[STUFF_27_LABELS[category["id"] - 1]]
        assert coarse == category["supercategory"].replace("raw-", "raw ")
        words = category["name"].removesuffix("-other").removesuffix("-stuff").split("-")
        ours = STUFF_171[STUFF_171_LABELS[category["id"] - 1]].replace("playing field", "playingfield")
        assert ours in {" ".join(order) for order in permutations(words)}


@pytest.mark.parametrize(("split", "images"), [("val", 11), ("train", 14)])
def test_coco_areas_as_the_json_sums_them(split, images):
    """Pixels of each thing in each image against the areas of its segments; what is left is background."""
    root = shared("coco_cc")
    content = json.loads((root / f"panoptic_{split}2017.json").read_text())
    things = {c["id"]: c["name"] for c in content["categories"] if c["isthing"]}
    found = benchmark("coco-object", root, split=split)
    assert len(found.ids) == images
    for annotation in content["annotations"]:
        image, mask = found.read(f"{annotation['image_id']:012d}")
        areas = dict.fromkeys(found.classes, 0)
        for segment in annotation["segments_info"]:
            if segment["category_id"] in things:
                areas[things[segment["category_id"]]] += segment["area"]
        areas["background"] = image.width * image.height - sum(areas.values())
        assert dict(zip(found.classes, np.bincount(mask.ravel(), minlength=81).tolist(), strict=True)) == areas
        assert image.mode == "RGB"


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_coco_object_as_pycocotools_decodes_the_official_sample(tmp_path):
    """The official sample's panoptic masks, against the run-length masks of its detection form."""
    sample = shared("panopticapi_sample") / "sample_data"
    shutil.copy(sample / "panoptic_examples.json", tmp_path / "panoptic_val2017.json")
    (tmp_path / "panoptic_val2017").symlink_to(sample / "panoptic_examples")
    (tmp_path / "val2017").symlink_to(sample / "input_images")
    api, found = COCO(sample / "panoptic_coco_detection_format.json"), benchmark("coco-object", tmp_path)
    assert found.ids == ("000000142238", "000000439180")
    for id in found.ids:
        image, mask = found.read(id)
        expected = np.zeros(image.size[::-1], np.uint8)
        for annotation in api.imgToAnns[int(id)]:
            expected[api.annToMask(annotation) > 0] = COCO_OBJECT_LABELS[annotation["category_id"]]
        np.testing.assert_array_equal(mask, expected)
        assert len(present(mask)) > 1


def _voc_sample(tmp_path):
    root = shared("voc")
    for name in ("JPEGImages", "SegmentationClass"):
        (tmp_path / name).symlink_to(root / name)
    shutil.copy(root / "ids.txt", tmp_path / "val.txt")
    return benchmark("voc", tmp_path)


@pytest.mark.parametrize(
    ("id", "size", "points"),  # (x, y): what was seen there in the picture
    [
        ("2007_000925", (500, 353), {(120, 220): "sheep", (385, 200): "sheep", (250, 60): "background"}),
        ("2008_001895", (500, 333), {(150, 150): "dog", (400, 150): "person", (10, 100): "background"}),
        ("2009_004942", (500, 443), {(250, 220): "horse", (400, 200): "horse", (60, 150): "background"}),
    ],
)
def test_voc_masks_as_seen_by_eye(tmp_path, id, size, points):
    found = _voc_sample(tmp_path)
    image, mask = found.read(id)
    assert image.size == size
    assert {(x, y): found.classes[mask[y, x]] for x, y in points} == points


def test_voc_sample(tmp_path):
    found = _voc_sample(tmp_path)
    names = {found.classes[i] for id in found.ids for i in present(found.read(id)[1])}
    assert len(found.ids) == 9
    assert names == {"background", "aeroplane", "bird", "dog", "horse", "person", "sheep"}
    assert (found.read("2007_000925")[1] == VOID).sum() == 9432
    with pytest.raises(ValueError, match="1464 of 1464 have no image there"):
        benchmark("voc", tmp_path, ids=captions("voc.json"))


def test_cityscapes_sample(tmp_path):
    """labelIds as instanceIds has them (class * 1000 + number). The sample's labelTrainIds differ in 77 edge pixels."""
    root = shared("cityscapes_sample")
    found = benchmark("cityscapes", root)
    assert found.ids == ("frankfurt_000000_000294",)
    assert found.ids[0] in map(bare, captions("city.json"))
    mask = found.read(found.ids[0])[1]
    instances = np.asarray(Image.open(next((root / "gtFine").glob("*_instanceIds.png")))).astype(int)
    known = {c.id: 255 if c.ignore_in_eval else c.train_id for c in Cityscapes.classes}
    ids = np.where(instances >= 1000, instances // 1000, instances)
    np.testing.assert_array_equal(mask, np.vectorize(known.get)(ids))

    shutil.copytree(root, tmp_path / "trained")
    next((tmp_path / "trained" / "gtFine").glob("*_labelIds.png")).unlink()
    trained = benchmark("cityscapes", tmp_path / "trained").read(found.ids[0])[1]
    assert (trained != mask).sum() == 77
    for label in (*present(mask), VOID):
        assert np.bincount(trained[mask == label]).argmax() == label


def test_ade20k_sample():
    root = shared("ade20k_sample")
    lines = (root / "objectInfo150.txt").read_text().splitlines()[1:]
    found = benchmark("ade20k", root / "sampleData")
    assert found.classes == tuple(line.split("\t")[4].split(",")[0].strip() for line in lines)
    assert found.ids == ("ADE_val_00000001", "ADE_val_00000002", "ADE_val_00000003")
    assert set(found.ids) <= set(map(bare, captions("ade.json")))
    for id in found.ids:
        raw = np.asarray(Image.open(root / "sampleData" / "annotations" / f"{id}.png")).astype(int)
        np.testing.assert_array_equal(found.read(id)[1], np.where(raw == 0, 255, raw - 1))


def test_coco_captions_are_file_names_of_coco():
    root = shared("coco_cc")
    known = set(map(bare, captions("coco-object.json")))
    assert set(benchmark("coco-object", root).ids) <= known
