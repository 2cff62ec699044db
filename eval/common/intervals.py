"""95 % intervals of a number, and of a difference between two paired runs, by resampling the ids that both share.

An id is drawn, or left out, for both runs at once, so what makes one caption easier than another falls out of the
difference. The reference is held fixed: an interval says how a number varies with the captions and their noise.

Means and kernel distances have a bootstrap. A Frechet distance has a jackknife that leaves out one group of ids at a time: a
bootstrap sample has 63 % of the different images only, and where there are few images for each feature its spread is too
wide. No interval mends the bias of a Frechet distance: fewer images make it larger, the more so the wider
they spread, so a part of a difference between two runs may be of their spread. The kernel distance has no such bias.
"""

from collections.abc import Callable

import numpy as np


DRAWS = 1000
GROUPS = 40  # of ids that the jackknife leaves out


Spread = Callable[[float, np.ndarray], tuple[float, float]]


def resamples(images: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """How often each image is in each resample, [draws n]; the same for all runs of as many images."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), draws).astype(float)


def ratio_draws(above: np.ndarray, below: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sum(above) / sum(below) over images, of each resample; a mean where `below` is one."""
    return (weights @ above) / (weights @ below)


def left_out(images: int, seed: int = 0) -> np.ndarray:
    """Which images count when a group is left out, [groups n] of 0 and 1; the same for all runs of as many images."""
    if images < 3:
        raise ValueError(f"Expected at least three images for an interval of a Frechet distance, but got {images}.")
    groups = np.random.default_rng(seed).permutation(images) % min(GROUPS, images)
    return (groups != np.arange(min(GROUPS, images))[:, None]).astype(float)


def jackknife(value: float, draws: np.ndarray) -> tuple[float, float]:
    """95 % interval from the values with a group left out (Efron, The Jackknife, 1982, section 2.2)."""
    error = ((len(draws) - 1) * draws.var()) ** 0.5
    return float(value - 1.96 * error), float(value + 1.96 * error)


def interval(value: float, draws: np.ndarray) -> tuple[float, float]:
    """95 % interval of a bootstrap: the percentiles of the draws about their mean, laid around the value."""
    low, high = np.percentile(draws - draws.mean(), [2.5, 97.5])
    return float(value + low), float(value + high)


def difference(
    value: float, draws: np.ndarray, base: float, base_draws: np.ndarray, spread: Spread = interval
) -> dict:
    """A run's value beyond the base's with its 95 % interval, and whether zero lies in it; the draws are paired."""
    low, high = spread(value - base, draws - base_draws)
    return {"difference": value - base, "difference_interval": (low, high), "within_noise": bool(low <= 0 <= high)}
