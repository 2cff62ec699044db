"""Protocols of evaluation as named, frozen choices: every result says which one it followed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from eval.datasets.benchmarks import Benchmark, dataset_of
from eval.datasets.folders import VOID


@dataclass(frozen=True)
class Protocol:
    """What counts, on which images, and who chooses the background's threshold.

    Args:
        name: in TOML files and results.
        released: as the released code of GoCA has it: its split of a dataset, and classes merged, where they differ.
        void_counts: void pixels are background.
        absent_counts: a class that never occurs has an IoU of zero and takes part in the mean.
        best_value: among several values of the background rule the one that is best on the evaluated images is reported, not
            the one that is best on training images.
        background: `kind`, `values` and order of a `BackgroundRule`, where an experiment and a method say none.
    """

    name: str
    released: bool
    void_counts: bool
    absent_counts: bool
    best_value: bool
    background: Mapping

    def split(self, benchmark: str) -> str:
        """The split that is evaluated."""
        dataset = dataset_of(benchmark)
        return (self.released and dataset.released_split) or dataset.split

    def merged(self, benchmark: str) -> Mapping[str, str]:
        """Classes that count as another one."""
        return dataset_of(benchmark).merged if self.released else {}

    def asked(self, benchmark: str, name: str) -> str:
        """The class that counts where a prompt's words stand for `name`."""
        return self.merged(benchmark).get(name, name)

    def applied(self, benchmark: Benchmark) -> Benchmark:
        """The benchmark with the classes and masks that count."""
        if not self.void_counts:
            return benchmark
        if benchmark.name == "scenes":
            raise ValueError("Expected a benchmark whose masks have void pixels for this protocol: Scenes has none.")
        counted = _with_background(benchmark) if benchmark.background is None else benchmark
        return replace(counted, read=_void_to_background(_merged(counted, self.merged(benchmark.name))))


STANDARD = Protocol(
    "standard",
    released=False,
    void_counts=False,
    absent_counts=False,
    best_value=False,
    background={"kind": "offset", "values": [0.0], "merged": False},
)
"""As the field evaluates: validation images, void pixels left out, classes that occur, no choice on the test images.

The background's rule is the one that was best on validation scenes: configs/segment/scenes_background_values.toml.
"""

GOCA = Protocol(
    "goca",
    released=True,
    void_counts=True,
    absent_counts=True,
    best_value=True,
    background={"kind": "offset", "values": [0.2], "merged": True},
)
"""As the released code of GoCA (arXiv 2603.06178) evaluates, with what that implies for Pascal's training images."""

PROTOCOLS = {protocol.name: protocol for protocol in (STANDARD, GOCA)}


def _with_background(benchmark: Benchmark) -> Benchmark:
    """A background class before all others, which only void pixels have."""

    def read(name):
        image, mask = benchmark.read(name)
        return image, np.where(mask == VOID, VOID, mask + 1).astype(np.uint8)

    return replace(benchmark, classes=("background", *benchmark.classes), read=read)


def _merged(benchmark: Benchmark, merged: Mapping[str, str]) -> Callable[[str], tuple[Image.Image, np.ndarray]]:
    """Pixels of a merged class count as the other one's, and the class itself stays empty."""
    if not merged:
        return benchmark.read
    table = np.arange(256, dtype=np.uint8)
    for name, other in merged.items():
        table[benchmark.classes.index(name)] = benchmark.classes.index(other)

    def read(name):
        image, mask = benchmark.read(name)
        return image, table[mask]

    return read


def _void_to_background(read):
    def counted(name):
        image, mask = read(name)
        return image, np.where(mask == VOID, 0, mask).astype(np.uint8)

    return counted
