"""Distances between two sets of features: Frechet, and the kernel distance that is KID on Inception's.

Statistics are sums in float64, so they depend neither on batches nor on their order beyond rounding. A distance can be asked
for many resamples of the images at once, for the intervals of `eval.common.intervals`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from accelerate import PartialState
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch_fidelity.metric_prc import calculate_precision_recall_part
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_kernel

from eval.common.files import replacing
from eval.common.processes import slices
from eval.generation import features
from eval.generation.networks import Backbone
from eval.generation.run_folder import SUFFIXES, Item, visible
from eval.scenes.scene import scene


BLOCK = 1024  # rows that are read, or compared with all others, at a time
NEIGHBOURHOOD = 3  # of precision and recall, as their paper chose
SCENES = 5000  # of the reference "scenes"


# ---- Frechet ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Statistics:
    """`mean` [d] and `covariance` [d d] (divided by n - 1), float64; how many images, where that is known.

    `made_with`: settings of the `eval.generation.networks.Backbone`, where they are known.
    """

    mean: np.ndarray
    covariance: np.ndarray
    images: int | None = None
    made_with: Mapping = field(default_factory=dict)

    @property
    def rank_deficient(self) -> bool:
        """Whether there are too few images for a covariance of full rank."""
        return self.images is not None and self.images <= len(self.mean)

    def write(self, path: Path) -> None:
        """An .npz file with the keys `mu` and `sigma`, which pytorch-fid, clean-fid and T2IBenchmark read too."""
        facts = json.dumps({"images": self.images, "made_with": dict(self.made_with)})
        with replacing(path) as part, part.open("wb") as file:
            np.savez(file, mu=self.mean, sigma=self.covariance, told=np.array(facts))

    @classmethod
    def read(cls, path: Path) -> "Statistics":
        """Of ours, pytorch-fid, clean-fid or T2IBenchmark: `mu` [d], `sigma` [d d]; ValueError for others."""
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, covariance = (np.asarray(file[key], np.float64) for key in ("mu", "sigma"))
                facts = json.loads(str(file["told"])) if "told" in file else {}
        except (OSError, KeyError, ValueError, TypeError, AttributeError, EOFError, BadZipFile) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"Expected an .npz file with `mu` and `sigma`, but {path} is none ({reason}).") from error
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            shapes = f"{mean.shape} and {covariance.shape}"
            raise ValueError(f"Expected mu [d] and sigma [d d] in {path}, but got {shapes}.")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError(f"Expected finite statistics in {path}, but got NaN or infinity.")
        if not np.allclose(covariance, covariance.T, atol=1e-6 * np.abs(covariance).max()):
            raise ValueError(f"Expected a symmetric sigma in {path}, but it is not.")
        return cls(mean, covariance, **facts)


def statistics(blocks: Iterable[np.ndarray], made_with: Mapping | None = None) -> Statistics:
    """Mean and covariance of features that come in blocks [b d]; ValueError for fewer than two images.

    Sums are taken about the first image, so that nothing is lost where features vary little.
    """
    count, origin, total, squares = 0, None, 0.0, 0.0
    for block in blocks:
        rows = np.asarray(block, np.float64)
        origin = rows[0] if origin is None else origin
        rows = rows - origin
        count, total, squares = count + len(rows), total + rows.sum(0), squares + rows.T @ rows
    if count < 2:
        raise ValueError(f"Expected at least two images for a covariance, but got {count}.")
    mean = total / count
    return Statistics(origin + mean, (squares - count * np.outer(mean, mean)) / (count - 1), count, made_with or {})


def frechet(one: Statistics, other: Statistics) -> float:
    """Squared Frechet distance of two Gaussians (arXiv 1706.08500, equation 6), by torchmetrics.

    Its public class takes images; its formula takes statistics, which may come from a file.
    """
    check_sizes(one, len(other.mean))
    parts = (one.mean, one.covariance, other.mean, other.covariance)
    return float(_compute_fid(*map(torch.from_numpy, parts)))


def check_sizes(real: Statistics, size: int) -> None:
    if len(real.mean) != size:
        sizes = f"{len(real.mean)} of the reference and {size} of the run"
        raise ValueError(
            f"Expected features of one network, but got {sizes}: the reference's statistics are of another."
        )


def frechet_draws(real: Statistics, fake: np.ndarray, weights: np.ndarray, device: str = "cpu") -> np.ndarray:
    """Squared Frechet distance from features [n d], one for each row of `weights` [t n], how often each image counts.

    With the reference's covariance B B^T, the eigenvalues of the product of both covariances are those of the symmetric
    B^T S B, which is the covariance of x B: rows that are computed once.
    """
    check_sizes(real, fake.shape[1])
    values, vectors = np.linalg.eigh(real.covariance)
    kept = values > values.max(initial=0) * len(values) * np.finfo(float).eps
    centred = torch.as_tensor(np.asarray(fake, np.float64) - real.mean, device=device)
    rows = centred @ torch.as_tensor(vectors[:, kept] * np.sqrt(values[kept]), device=device)
    lengths, trace = (centred**2).sum(1), float(np.trace(real.covariance))
    times = torch.as_tensor(weights, dtype=torch.float64, device=device)
    return np.array([trace + _of_resample(centred, rows, lengths, each) for each in times])


def _of_resample(centred, rows, lengths, times) -> float:
    """What one resample adds to the trace of the reference's covariance."""
    count, drawn = times.sum(), times > 0
    mean, at = (times @ centred) / count, (times @ rows) / count
    part = rows[drawn] * times[drawn, None].sqrt()
    covariance = (part.T @ part - count * torch.outer(at, at)) / (count - 1)
    trace = (times @ lengths - count * mean @ mean) / (count - 1)
    roots = torch.linalg.eigvalsh(covariance).clamp(min=0).sqrt().sum()
    return float(mean @ mean + trace - 2 * roots)


# ---- kernel, neighbours ----------------------------------------------------------------------------------------------
class KernelDistance:
    """Unbiased squared MMD with KID's cubic kernel (arXiv 1801.01401, section 4), from real features [m d].

    All pairs are compared. torchmetrics and torch-fidelity average over 100 random subsets of 1,000 images; over all subsets
    that average is this number.
    """

    def __init__(self, real: np.ndarray, device: str = "cpu"):
        if len(real) < 2:
            raise ValueError(f"Expected at least two real images, but got {len(real)}.")
        self.real = torch.as_tensor(real, dtype=torch.float64, device=device)

    @cached_property
    def within(self) -> float:
        """Mean kernel of two different real images."""
        count = len(self.real)
        return float(pair_sums(self.real, self.real.new_ones(1, count))) / (count * (count - 1))

    def __call__(self, fake: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """From features [n d], one for each row of `weights` [t n], how often each image counts.

        Copies of one image are no pair: with them, a resample would be biased.
        """
        if len(fake) < 2:
            raise ValueError(f"Expected at least two images, but got {len(fake)}.")
        rows, times = (torch.as_tensor(x, dtype=torch.float64, device=self.real.device) for x in (fake, weights))
        across = torch.cat([poly_kernel(part, self.real).mean(1) for part in rows.split(BLOCK)])
        count = times.sum(1)
        pairs = count**2 - (times**2).sum(1)
        return (self.within + pair_sums(rows, times) / pairs - 2 * (times @ across) / count).cpu().numpy()


def pair_sums(rows: Float[Tensor, "n d"], times: Float[Tensor, "t n"]) -> Float[Tensor, " t"]:
    """Sum of times_i times_j kernel(i, j) over all i other than j."""
    total = torch.zeros_like(times[:, 0])
    for start in range(0, len(rows), BLOCK):
        kernel = poly_kernel(rows[start : start + BLOCK], rows)
        kernel.diagonal(start).zero_()
        total += (times[:, start : start + BLOCK] * (times @ kernel.T)).sum(1)
    return total


def precision_recall(real: np.ndarray, fake: np.ndarray, device: str = "cpu") -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991, section 2) by torch-fidelity, shares from 0 to 1."""
    if min(len(real), len(fake)) <= NEIGHBOURHOOD:
        counts = f"{len(real)} and {len(fake)}"
        raise ValueError(f"Expected more than {NEIGHBOURHOOD} images on each side, but got {counts}.")
    sets = (torch.from_numpy(each).to(device) for each in (fake, real))
    return calculate_precision_recall_part(*sets, NEIGHBOURHOOD, BLOCK)


# ---- from a reference ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Reference:
    """Real images, or their statistics. `other_files`: files in the folder that are no images."""

    path: str
    items: tuple[Item, ...] = ()
    statistics: Statistics | None = None
    other_files: int = 0

    @property
    def images(self) -> int | None:
        return self.statistics.images if self.statistics else len(self.items)


def read_reference(path: str, state: PartialState) -> Reference:
    """From a folder, an .npz file, or "scenes"; ValueError for anything else, and for a folder without images."""
    folder = Path(path)
    if path == "scenes":
        folder = features.RUNS / f"scenes-{SCENES}"
        with state.main_process_first():
            draw_scenes(folder)
    if folder.suffix == ".npz":
        return Reference(path, statistics=Statistics.read(folder))
    if not folder.is_dir():
        raise ValueError(f'Expected a folder of images, an .npz file or "scenes" as reference, but got {path!r}.')
    files = visible(folder)
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if len(images) < 2:
        raise ValueError(f"Expected at least two images as reference, but {path} has {len(images)}.")
    items = [Item(str(file.relative_to(folder)), file) for file in images]
    return Reference(path, tuple(items), other_files=len(files) - len(images))


def draw_scenes(folder: Path) -> None:
    """The first scenes of the test split as PNG files, if they are not all there."""
    if len([*folder.glob("*.png")]) != SCENES:
        with replacing(folder) as part:
            part.mkdir(parents=True)
            for number in range(SCENES):
                Image.fromarray(scene("test", number).image).save(part / f"{number:06d}.png")


class FeatureSpace:
    """A network's features, and the real images in them."""

    def __init__(self, backbone: Backbone, reference: Reference | None, state: PartialState, batch: int):
        self.backbone, self.reference, self.state, self.batch = backbone, reference, state, batch
        self.device = "cuda" if state.device.type == "cuda" else "cpu"  # not every accelerator has float64

    def compute(self, items: Sequence[Item]) -> None:
        """Have the features on disk."""
        features.kept(items, self.backbone, self.state, self.batch)

    def features(self, items: Sequence[Item]) -> np.ndarray:
        return features.features(items, self.backbone, self.state, self.batch)

    @cached_property
    def real(self) -> np.ndarray:
        return self.features(self.reference.items)

    @cached_property
    def statistics(self) -> Statistics:
        """Of the real images; ValueError for a file that another network or preprocessing made."""
        known, settings = self.reference.statistics, self.backbone.settings
        if known is None:
            return statistics(slices(self.real, BLOCK), settings)
        if known.made_with and known.made_with != settings:
            made = f"{self.reference.path} holds those of {known.made_with}"
            raise ValueError(f"Expected statistics of {settings}, but {made}.")
        return known

    @cached_property
    def kernel(self) -> KernelDistance:
        return KernelDistance(self.real, self.device)
