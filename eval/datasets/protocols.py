"""Protocols of evaluation as named, frozen choices: every result says which one it followed."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from eval.datasets.benchmarks import VOID, Benchmark


MERGED = {"food-stuff": "food", "furniture-stuff": "furniture"}  # by the released code of GoCA, on COCO-Stuff 27


@dataclass(frozen=True)
class Protocol:
    """What counts, on which images, and who chooses the background's threshold.

    `splits`: of each benchmark that is not evaluated on "val". `void_counts`: void pixels are background. `absent_counts`: a
    class that never occurs has an IoU of zero and takes part in the mean. `best_value`: among several values of the
    background rule the one that is best on the evaluated images is reported, not the one that is best on training images.
    """

    name: str
    splits: dict[str, str]
    void_counts: bool
    absent_counts: bool
    best_value: bool

    def split(self, benchmark: str) -> str:
        """The split that is evaluated."""
        return self.splits.get(benchmark, "val")

    def asked(self, benchmark: str, name: str) -> str:
        """The class that counts where a prompt's words stand for `name`."""
        return MERGED.get(name, name) if self.void_counts and benchmark == "coco-stuff-27" else name

    def applied(self, benchmark: Benchmark) -> Benchmark:
        """The benchmark with the classes and masks that count."""
        if not self.void_counts:
            return benchmark
        if benchmark.name == "scenes":
            raise ValueError("Expected a benchmark whose masks have void pixels for this protocol: Scenes has none.")
        counted = _with_background(benchmark) if benchmark.background is None else benchmark
        return replace(counted, read=_void_to_background(_merged(counted)))


STANDARD = Protocol("standard", {"scenes": "test"}, void_counts=False, absent_counts=False, best_value=False)
"""As the field evaluates: validation images, void pixels left out, classes that occur, no choice on the test images."""

GOCA = Protocol(
    "goca", {"voc": "train", "context": "train"}, void_counts=True, absent_counts=True, best_value=True
)  # fmt: skip
"""As the released code of GoCA (arXiv 2603.06178) evaluates, with what that implies for Pascal's training images."""

PROTOCOLS = {protocol.name: protocol for protocol in (STANDARD, GOCA)}


def _with_background(benchmark: Benchmark) -> Benchmark:
    """A background class before all others, which only void pixels have."""

    def read(name):
        image, mask = benchmark.read(name)
        return image, np.where(mask == VOID, VOID, mask + 1).astype(np.uint8)

    return replace(benchmark, classes=("background", *benchmark.classes), read=read)


def _merged(benchmark: Benchmark) -> Callable[[str], tuple[Image.Image, np.ndarray]]:
    """On COCO-Stuff 27, stuff of food and furniture counts as the things do, and the two stuff classes stay empty."""
    if benchmark.name != "coco-stuff-27":
        return benchmark.read
    table = np.arange(256, dtype=np.uint8)
    for stuff, thing in MERGED.items():
        table[benchmark.classes.index(stuff)] = benchmark.classes.index(thing)

    def read(name):
        image, mask = benchmark.read(name)
        return image, table[mask]

    return read


def _void_to_background(read):
    def counted(name):
        image, mask = read(name)
        return image, np.where(mask == VOID, 0, mask).astype(np.uint8)

    return counted
