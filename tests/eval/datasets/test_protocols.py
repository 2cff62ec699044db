"""What each protocol counts: classes, void, absent classes, splits."""

import numpy as np
import pytest
from PIL import Image

from eval.datasets.benchmarks import Benchmark, benchmark
from eval.datasets.coco import STUFF_27
from eval.datasets.folders import VOID
from eval.datasets.protocols import GOCA, STANDARD


def made(name, classes, mask):
    picture = Image.new("RGB", (2, 2))
    return Benchmark(name, classes, ("a",), lambda _: (picture, np.array(mask, dtype=np.uint8)))


def test_standard_changes_nothing():
    voc = made("voc", ("background", "cat"), [[0, 1], [VOID, 1]])
    assert STANDARD.applied(voc) is voc
    assert (STANDARD.split("voc"), STANDARD.split("scenes")) == ("val", "test")
    assert [STANDARD.void_counts, STANDARD.absent_counts, STANDARD.best_value] == [False] * 3


def test_goca_counts_void_as_background():
    """On Pascal's training images, as its released code does."""
    voc = GOCA.applied(made("voc", ("background", "cat"), [[0, 1], [VOID, 1]]))
    assert voc.classes == ("background", "cat")
    assert voc.read("a")[1].tolist() == [[0, 1], [0, 1]]
    assert [GOCA.split(name) for name in ("voc", "context", "ade20k")] == ["train", "train", "val"]


def test_goca_gives_every_benchmark_a_background():
    """19 classes of Cityscapes become 20, 150 of ADE20K become 151."""
    city = GOCA.applied(made("cityscapes", ("road", "car"), [[0, 1], [VOID, VOID]]))
    assert city.classes == ("background", "road", "car")
    assert city.read("a")[1].tolist() == [[1, 2], [0, 0]]


def test_goca_merges_stuff_into_things():
    """On COCO-Stuff 27: food and furniture; their stuff classes stay, and stay empty."""
    labels = [[STUFF_27.index(name) for name in row] for row in (("food-stuff", "food"), ("furniture-stuff", "sky"))]
    benchmark = GOCA.applied(made("coco-stuff-27", STUFF_27, labels))
    names = [[benchmark.classes[label] for label in row] for row in benchmark.read("a")[1].tolist()]
    assert names == [["food", "food"], ["furniture", "sky"]]
    assert len(benchmark.classes) == 28


def test_scenes_have_no_void():
    with pytest.raises(ValueError, match="Scenes has none"):
        GOCA.applied(made("scenes", ("cat",), [[0, 0], [0, 0]]))


def test_goca_takes_scenes_with_a_background():
    animals = benchmark("scenes-animals", ids=["000000"])
    assert np.array_equal(GOCA.applied(animals).read("000000")[1], animals.read("000000")[1])
    assert GOCA.applied(animals).words("000000") == animals.words("000000")


def test_the_released_order_of_the_background_is_gocas():
    assert GOCA.background == {"kind": "offset", "values": [0.2], "merged": True}
