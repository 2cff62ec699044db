"""Regions of a generated picture, painted with their names."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from scipy.ndimage import distance_transform_edt

from goca_guidance import Regions
from goca_guidance.pictures import as_labels, painted_regions


LEAST = 0.03  # share of the pixels from which on a region gets its name


def paint_regions(axis: Axes, regions: Regions, sample: int) -> None:
    """Regions in colours, the larger ones with a name where they are widest; what is not foreground is pale."""
    labels = as_labels(regions, sample).numpy()
    axis.imshow(painted_regions(regions, sample))
    for index, name in enumerate(regions.labels[sample]):
        region = labels == index
        if region.mean() > LEAST:
            y, x = np.unravel_index(distance_transform_edt(np.pad(region, 1)).argmax(), np.add(region.shape, 2))
            edge = [withStroke(linewidth=1.5, foreground="white")]
            axis.text(x - 1, y - 1, name, ha="center", va="center", fontsize=6, path_effects=edge)
