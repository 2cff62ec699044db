"""Readers of the benchmarks on generated miniatures of each layout, and beside torchvision's; mistakes are named."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import Cityscapes, VOCSegmentation

from eval.datasets.benchmarks import DATASETS, BadSample, bare, benchmark, present
from eval.datasets.folders import VOID
from eval.scenes import scene
from tests.helpers.miniatures import CLASS_COUNTS, SIZE, miniature, relist


NAMES = sorted(CLASS_COUNTS)


def test_every_dataset_is_tested():
    """A new one has its miniature in `tests/helpers/miniatures.py`."""
    assert set(CLASS_COUNTS) == {name for name, dataset in DATASETS.items() if dataset.layout}


@pytest.mark.parametrize("name", NAMES)
def test_miniature_is_read_back(name, tmp_path):
    truths = miniature(name, tmp_path)
    found = benchmark(name, tmp_path)
    assert (found.name, found.ids) == (name, tuple(sorted(truths)))
    assert len(found.classes) == len(set(found.classes)) == CLASS_COUNTS[name]
    for id in found.ids:
        image, mask = found.read(id)
        assert (image.mode, image.size, mask.dtype, mask.shape) == ("RGB", SIZE[::-1], np.uint8, SIZE)
        assert np.abs(np.asarray(image).astype(int) - truths[id].colour).max() <= 4  # JPEG
        np.testing.assert_array_equal(mask, truths[id].mask)


@pytest.mark.parametrize("name", NAMES)
def test_miniatures_differ_by_label(name, tmp_path):
    """The readers are not compared with an empty truth: several classes, and VOID where the layout knows it."""
    masks = np.stack([truth.mask for truth in miniature(name, tmp_path).values()])
    assert len(np.unique(masks)) >= 3
    assert (VOID in masks) == (name not in ("context", "coco-object"))


@pytest.mark.parametrize("name", NAMES)
def test_other_split_and_pickle(name, tmp_path):
    truths = miniature(name, tmp_path, split="train")
    for split in ("train", "training"):
        found = pickle.loads(pickle.dumps(benchmark(name, tmp_path, split=split)))
        np.testing.assert_array_equal(found.read(found.ids[0])[1], truths[found.ids[0]].mask)
    with pytest.raises(ValueError, match=r"Expected .*val"):
        benchmark(name, tmp_path)


def test_voc_as_torchvision_reads_it(tmp_path):
    miniature("voc", tmp_path)
    ours, theirs = benchmark("voc", tmp_path), VOCSegmentation(tmp_path, year="2012", image_set="val")
    for id, (image, mask) in zip(ours.ids, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(ours.read(id)[0]), np.asarray(image))
        np.testing.assert_array_equal(ours.read(id)[1], np.asarray(mask))


def test_cityscapes_as_torchvision_knows_it(tmp_path):
    miniature("cityscapes", tmp_path)
    ours, theirs = benchmark("cityscapes", tmp_path), Cityscapes(tmp_path, split="val", target_type="semantic")
    known = {c.id: 255 if c.ignore_in_eval else c.train_id for c in Cityscapes.classes}
    assert ours.classes == tuple(
        c.name for c in sorted(Cityscapes.classes, key=lambda c: c.train_id) if known[c.id] < 255
    )
    by_name = dict(zip(map(bare, theirs.images), theirs, strict=True))
    for id in ours.ids:
        image, mask = by_name[id]
        np.testing.assert_array_equal(ours.read(id)[1], np.vectorize(known.get)(np.asarray(mask)))
        np.testing.assert_array_equal(np.asarray(ours.read(id)[0]), np.asarray(image))


@pytest.mark.parametrize("place", ["VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_from_inner_folders_and_augmented_masks(tmp_path, place):
    truths = miniature("voc", tmp_path)
    id, truth = next(iter(truths.items()))
    augmented = truth.annotation.parents[1] / "SegmentationClassAug" / truth.annotation.name
    augmented.parent.mkdir()
    truth.annotation.rename(augmented)
    np.testing.assert_array_equal(benchmark("voc", tmp_path / place).read(id)[1], truth.mask)


@pytest.mark.parametrize("folder", ["SegmentationClassContext", "SegmentationClass_Context"])
def test_context_as_converted_png(tmp_path, folder):
    truths = miniature("context", tmp_path)
    shutil.rmtree(tmp_path / "trainval")
    base = tmp_path / "VOCdevkit" / "VOC2010"
    (base / folder).mkdir()
    for id, truth in truths.items():
        Image.fromarray(truth.mask).save(base / folder / f"{id}.png")
    for id, truth in truths.items():
        np.testing.assert_array_equal(benchmark("context", base).read(id)[1], truth.mask)
        alone = np.where(truth.mask == 0, 255, truth.mask.astype(int) - 1)
        np.testing.assert_array_equal(benchmark("context-59", tmp_path).read(id)[1], alone)


def test_coco_in_its_other_folders(tmp_path):
    truths, stuff = miniature("coco-object", tmp_path), miniature("coco-stuff-171", tmp_path / "stuff")
    for path in (tmp_path / "annotations").iterdir():
        path.rename(tmp_path / path.name)
    (tmp_path / "images").mkdir()
    (tmp_path / "val2017").rename(tmp_path / "images" / "val2017")
    (tmp_path / "stuff" / "stuffthingmaps").rename(tmp_path / "stuff" / "annotations")
    for name, root, made in (("coco-object", tmp_path, truths), ("coco-stuff-171", tmp_path / "stuff", stuff)):
        found = benchmark(name, root)
        np.testing.assert_array_equal(found.read(found.ids[-1])[1], made[found.ids[-1]].mask)


def test_scenes():
    found = benchmark("scenes")
    assert (len(found.ids), found.ids[0], found.ids[-1], found.classes) == (1000, "000000", "000999", scene.CLASSES)
    image, mask = benchmark("scenes", split="val", ids=["002000.png"]).read("002000")
    drawn = scene.scene("validation", 2000)
    np.testing.assert_array_equal(np.asarray(image), drawn.image)
    np.testing.assert_array_equal(mask, drawn.mask)
    assert {scene.CLASSES[i] for i in present(mask)} == set(drawn.names)


# ids


def test_ids_with_and_without_endings(tmp_path):
    for name, keys in (
        ("voc", ["2008_000001.jpg", "2007_000032"]),
        ("coco-stuff-27", ["000000000285.jpg"]),
        ("cityscapes", ["lindau/lindau_000000_000019_leftImg8bit.png", "frankfurt_000000_000294"]),
        ("ade20k", {"ADE_val_00000002.jpg": {"caption": "a wall"}}),
    ):
        miniature(name, tmp_path / name)
        found = benchmark(name, tmp_path / name, ids=keys)
        assert found.ids == tuple(sorted(map(bare, keys)))
        assert found.read(found.ids[0])
        with pytest.raises(ValueError, match="one of the benchmark's"):
            found.read("another")
    with pytest.raises(TypeError, match="Put it into a list"):
        benchmark("scenes", ids="000001")


@given(st.sets(st.integers(0, 9_999_999), min_size=1, max_size=20))
def test_ids_are_sorted_whatever_their_order(numbers):
    keys = [f"{number:06d}" for number in numbers]
    assert benchmark("scenes", ids=keys[::-1]).ids == tuple(sorted(keys))


@given(st.lists(st.integers(0, 255), min_size=1, max_size=30))
def test_present(labels):
    assert present(np.array([labels], np.uint8)) == tuple(sorted(set(labels) - {255}))


# mistakes


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("pascal", {}, "Expected a benchmark among voc, context"),
        ("voc", {}, "Expected the folder of voc as root, but got None"),
        ("voc", {"root": "nowhere"}, "but got nowhere, which is no folder"),
        ("voc", {"split": "test"}, r"file ImageSets/Segmentation/test.txt or test.txt in .*VOC2012"),
        ("voc", {"ids": ["2007_000032", "x", "y.jpg"]}, "but 2 of 3 have no image there: x, y"),
        (
            "voc",
            {"ids": ["2007_000032", "2007_000032.jpg"]},
            "Expected every id once among the given ids.*2007_000032",
        ),
        ("voc", {"ids": []}, "but got none"),
        ("ade20k", {"split": "test"}, r"folder test in .*there are: training, validation"),
        ("cityscapes", {"split": "test"}, r"folder test in .*leftImg8bit"),
        ("coco-object", {"split": "test"}, "file annotations/panoptic_test2017.json or panoptic_test2017.json"),
        ("coco-stuff-27", {"split": "test"}, "folder stuffthingmaps/test2017 or annotations/test2017"),
        ("context", {"split": "test"}, "ImageSets/SegmentationContext/test.txt or pascalcontext_test.txt or test.txt"),
        ("scenes", {"split": "test1"}, "among train, validation, test, but got 'test1'"),
        ("scenes", {"root": "nowhere"}, "Expected no root for scenes"),
        ("scenes", {"ids": ["7"]}, "1 of 1 have no image there: 7"),
    ],
)
def test_mistakes_are_named(tmp_path, name, arguments, message):
    root = tmp_path if "split" in arguments or "ids" in arguments else None
    if name in CLASS_COUNTS and root:
        miniature(name, root)
        (tmp_path / "ADEChallengeData2016" / "images" / "training").mkdir(parents=True, exist_ok=True)
    with pytest.raises(ValueError, match=message):
        benchmark(name, **{"root": None if name == "scenes" else root, **arguments})


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_folder_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=r"Expected .* but .* not there|but none is there"):
        benchmark(name, tmp_path)


def test_empty_and_repeating_lists(tmp_path):
    miniature("voc", tmp_path)
    listed = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    relist(listed, ["2007_000032", "2007_000039", "2007_000032"])
    with pytest.raises(ValueError, match=r"once in .*val.txt, but 1 come twice: 2007_000032"):
        benchmark("voc", tmp_path)
    relist(listed, [])
    with pytest.raises(ValueError, match=r"split 'val' of voc in .* but it is empty"):
        benchmark("voc", tmp_path)


def test_foreign_names_of_context(tmp_path):
    miniature("context", tmp_path)
    path = tmp_path / "labels.txt"
    path.write_text(path.read_text().replace("25: bird", "25: cat"))
    with pytest.raises(ValueError, match=r"Expected 25: 'bird' in .*labels.txt, but got ' cat'"):
        benchmark("context", tmp_path)


def _shorten(path):
    path.write_bytes(path.read_bytes()[:40])


def _enlarge(path):
    if path.suffix == ".mat":
        savemat(path, {"LabelMap": np.ones((9, 9), np.uint16)})
    else:
        Image.open(path).resize((9, 9), Image.NEAREST).save(path)


def _flatten(path):
    if path.suffix == ".mat":
        savemat(path, {"another": 1})
    else:
        Image.open(path).convert("RGB" if Image.open(path).mode != "RGB" else "L").save(path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "expected the mask there, but it is missing"),
        (_shorten, "expected a whole mask, but got"),
        (_enlarge, "expected a mask of height x width 12 x 16, .* but got 9 x 9"),
        (_flatten, "expected a whole mask, but got (ValueError: expected|KeyError: 'LabelMap')"),
    ],
)
def test_bad_masks(tmp_path, name, spoil, message):
    truths = miniature(name, tmp_path)
    found = benchmark(name, tmp_path)
    spoil(truths[found.ids[0]].annotation)
    with pytest.raises(BadSample, match=message) as caught:
        found.read(found.ids[0])
    assert str(truths[found.ids[0]].annotation) in str(caught.value)
    assert found.read(found.ids[1])  # the run goes on


@pytest.mark.parametrize(
    ("spoil", "message"), [(Path.unlink, "image there, but it is missing"), (_shorten, "whole image")]
)
def test_bad_images(tmp_path, spoil, message):
    truths = miniature("voc", tmp_path)
    spoil(truths["2007_000032"].image)
    with pytest.raises(BadSample, match=message):
        benchmark("voc", tmp_path).read("2007_000032")


@pytest.mark.parametrize(
    ("name", "foreign"),
    [
        ("voc", 21),
        ("coco-stuff-171", 182),
        ("coco-stuff-27", 11),
        ("cityscapes", 34),
        ("ade20k", 151),
        ("coco-object", 5),
    ],
)
def test_ids_outside_the_label_set(tmp_path, name, foreign):
    truths = miniature(name, tmp_path)
    path = truths[min(truths)].annotation
    with Image.open(path) as file:
        values = np.array(file)
    values[:2, :3] = foreign if values.ndim == 2 else (foreign, 0, 0)
    Image.fromarray(values).save(path)
    with pytest.raises(BadSample, match=rf"got \[{foreign}\] in 6 pixels"):
        benchmark(name, tmp_path).read(min(truths))


def test_ids_outside_the_label_set_of_context(tmp_path):
    path = miniature("context", tmp_path)["2008_000002"].annotation
    savemat(path, {"LabelMap": np.full(SIZE, 460, np.uint16)})
    with pytest.raises(BadSample, match=r"got \[460\] in 192 pixels"):
        benchmark("context", tmp_path).read("2008_000002")


# other forms of masks, which would be read as other classes


def _rewrite(truths, change):
    """Every mask of one channel, changed."""
    for truth in truths.values():
        with Image.open(truth.annotation) as file:
            Image.fromarray(change(np.array(file)).astype(np.uint8)).save(truth.annotation)


def _fill(truth, *ids):
    """A mask of these ids, in columns of equal width, as a PNG file."""
    Image.fromarray(np.resize(np.repeat(ids, SIZE[1] // len(ids)), SIZE).astype(np.uint8)).save(truth.annotation)


def _reduced(ids):
    """As `reduce_zero_label` of mmsegmentation has it: 0 to 255, all else one less."""
    return np.where((ids == 0) | (ids == 255), 255, ids - 1)


def _train_ids(ids):
    known = {c.id: 255 if c.ignore_in_eval else c.train_id for c in Cityscapes.classes}
    return np.vectorize(known.get)(ids)


def _grey(ids):
    """The masks of VOC in its palette's colours, saved as grey."""
    colours = {0: (0, 0, 0), 1: (128, 0, 0), 12: (64, 0, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    picture = np.array([colours[i] for i in ids.flat], np.uint8).reshape(*ids.shape, 3)
    return np.array(Image.fromarray(picture).convert("L"))


def _one_more(ids):
    return np.where(ids == 255, 0, ids + 1)


@pytest.mark.parametrize(
    ("name", "likely", "telling", "change", "form"),
    [
        ("ade20k", (1, 13), (0, 1), _reduced, "reduced: 255 for other"),
        ("voc", (12, 0, 0, 0), (12, 0, 0, 0), _reduced, "reduced: 255 for background"),
        ("voc", (0, 255), (0, 12), _grey, "colours as grey"),
        ("cityscapes", (7, 8), (7, 4), _train_ids, "train ids"),
        ("coco-stuff-171", (0, 64), (0, 181), _one_more, "one more"),
        ("coco-stuff-27", (0, 64), (0, 66), _one_more, "one more"),
        ("coco-stuff-171", (0, 255), (27, 255), lambda ids: np.where(ids == 27, 25, ids), "train ids, 0 to 170"),
        (
            "coco-stuff-171",
            (92, 100),
            (181, 255),
            lambda ids: ids + 2 * (ids == 181) - 255 * (ids == 255),
            "stuff alone",
        ),
    ],
)
def test_masks_of_another_form_are_refused(tmp_path, name, likely, telling, change, form):
    """A mask with `likely` ids could be of both forms; another mask of the split tells, whichever is evaluated."""
    truths = miniature(name, tmp_path)
    for truth, ids in zip(truths.values(), (likely, likely, telling), strict=True):
        _fill(truth, *ids)
    assert benchmark(name, tmp_path).ids == tuple(sorted(truths))  # as they are, they are ours
    _rewrite(truths, change)
    with pytest.raises(ValueError, match=f"in their original form, .*{form}"):
        benchmark(name, tmp_path, ids=[min(truths)])


def test_label_ids_under_the_name_of_train_ids(tmp_path):
    for truth in miniature("cityscapes", tmp_path).values():
        _fill(truth, 7, 26)
        truth.annotation.rename(str(truth.annotation).replace("labelIds", "labelTrainIds"))
    with pytest.raises(ValueError, match=r"another \(label ids\): some of 3 hold \[26\]"):
        benchmark("cityscapes", tmp_path)


@pytest.mark.parametrize(
    ("ids", "form"), [((255, 0, 58), "reduced"), ((2, 59), None), ((0, 255), "reduced"), ((2, 187), "459 ids")]
)
def test_converted_masks_of_context(tmp_path, ids, form):
    truths = miniature("context", tmp_path)
    shutil.rmtree(tmp_path / "trainval")
    folder = tmp_path / "VOCdevkit/VOC2010/SegmentationClassContext"
    folder.mkdir()
    for id in truths:
        Image.fromarray(np.resize(ids, SIZE).astype(np.uint8)).save(folder / f"{id}.png")
    if form is None:
        assert benchmark("context", tmp_path).ids
    else:
        with pytest.raises(ValueError, match=f"another .*{form}"):
            benchmark("context", tmp_path)


def test_matlab_masks_of_context_in_60_classes(tmp_path):
    for truth in miniature("context", tmp_path).values():
        savemat(truth.annotation, {"LabelMap": np.resize([0, 59], SIZE).astype(np.uint16)})
    with pytest.raises(ValueError, match="converted to 0"):
        benchmark("context", tmp_path)


def test_one_damaged_mask_is_no_other_form(tmp_path):
    """Where any mask holds what only ours can hold, a strange one costs one image; and so where nothing tells."""
    first, second, _ = miniature("ade20k", tmp_path).values()
    _fill(first, 255, 3)
    _fill(second, 150, 3)
    found = benchmark("ade20k", tmp_path)
    with pytest.raises(BadSample, match=r"got \[255\]"):
        found.read(found.ids[0])
    _fill(first, 4, 5)
    assert benchmark("ade20k", tmp_path, ids=[found.ids[0]]).read(found.ids[0])


def test_contiguous_categories_of_coco(tmp_path):
    miniature("coco-object", tmp_path)
    path = tmp_path / "annotations" / "panoptic_val2017.json"
    content = json.loads(path.read_text())
    for each in content["annotations"]:
        for number, segment in enumerate(each["segments_info"]):
            segment["category_id"] = number
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"panoptic_val2017.json, but got .*categories \[0"):
        benchmark("coco-object", tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"images": [], "annotations": [{}]}'])
def test_damaged_annotations_of_coco_are_named(tmp_path, text):
    miniature("coco-object", tmp_path)
    (tmp_path / "annotations" / "panoptic_val2017.json").write_text(text)
    with pytest.raises(ValueError, match=r"annotations in .*panoptic_val2017.json, but got"):
        benchmark("coco-object", tmp_path)


# ---- scenes with a background ----------------------------------------------------------------------------------------
def test_what_is_no_animal_is_background_and_has_its_words():
    whole, animals = (benchmark(name, split="validation") for name in ("scenes", "scenes-animals"))
    assert animals.classes == ("background", "bird", "cat", "cow", "dog", "horse", "person", "sheep")
    assert (animals.ids, whole.background, animals.background) == (whole.ids, None, 0)
    several = 0
    for id in animals.ids[:40]:
        (image, every), (same, mask) = whole.read(id), animals.read(id)
        assert np.array_equal(np.asarray(image), np.asarray(same))
        shown = {whole.classes[label] for label in present(every)}
        assert {animals.classes[label] for label in present(mask)} - {"background"} == shown & {*animals.classes}
        assert {*animals.words(id)} == shown - {*animals.classes}
        for label, name in enumerate(animals.classes[1:], 1):
            assert np.array_equal(mask == label, every == whole.classes.index(name))
        several += len(animals.words(id)) > 1
        assert whole.words(id) == ()
    assert several > 5
    assert pickle.loads(pickle.dumps(animals)).words("000000") == animals.words("000000")
