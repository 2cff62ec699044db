"""The README's picture: where each word is, to the mean of all layers and to GoCA, in models that were trained on scenes."""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from eval.common.plots import write
from eval.common.processes import seed_of
from eval.scenes.levels import LEVELS, Question, question
from eval.scenes.models import MODELS
from eval.scenes.scene import CLASSES
from eval.segment.together import labelled, segment_together
from goca_guidance import GoCAConfig, GoCASCFGPipeline
from goca_guidance.pictures import colour


SHOWN = ("tiny-sd", "tiny-pixart", "tiny-flux")
SCENES = (("plain", 0), ("lookalikes", 0))  # level, and number of the test scene: the first ones
ROWS = {"vanilla": GoCAConfig.vanilla(), "GoCA": GoCAConfig(heads="contribution")}
TITLES = ("picture", "true regions", *ROWS)


def draw(models: Mapping[str, tuple[GoCASCFGPipeline, int]], path: Path) -> None:
    """A row for each model (with its timestep), and of each scene the picture, its mask, and the regions that were found."""
    rows = {model: [_panels(model, *loaded, *scene) for scene in SCENES] for model, loaded in models.items()}
    maps = [labels for row in rows.values() for _, *labels in row]
    present = sorted({int(label) for labels in chain.from_iterable(maps) for label in np.unique(labels)})
    shades = {label: colour(place) for place, label in enumerate(present)}
    figure = Figure(figsize=(1.5 * len(TITLES) * len(SCENES), 1.62 * len(rows) + 0.9), layout="constrained")
    grid = figure.subplots(len(rows), len(TITLES) * len(SCENES), squeeze=False)
    for title, axis in zip(TITLES * len(SCENES), grid[0], strict=True):
        axis.set_title(title, fontsize=9)
    for (model, row), axes in zip(rows.items(), grid, strict=True):
        panels = [(asked, labels) for asked, *found in row for labels in (None, *found)]
        for (asked, labels), axis in zip(panels, axes, strict=True):
            axis.imshow(asked.image if labels is None else _painted(asked, labels, shades))
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        axes[0].set_ylabel(model, fontsize=9)
    handles = [Patch(color=shade, label=CLASSES[label]) for label, shade in shades.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=10, fontsize=9, frameon=False)
    write(figure, path)


def _panels(
    model: str, pipe: GoCASCFGPipeline, timestep: int, level: str, index: int
) -> tuple[Question, Sequence[np.ndarray]]:
    """A question, its mask and the label map of each of ROWS [H W]."""
    home = MODELS[model].home
    asked = question(LEVELS[level], "test", index, home)
    found = segment_together(
        pipe, [asked.image], [asked.names], list(ROWS.values()), timestep=timestep, height=home, width=home,
        generator=[torch.Generator().manual_seed(seed_of(0, f"test {index}"))], **MODELS[model].arguments,
    )  # fmt: skip
    return asked, asked.mask, *(labelled(found[config], CLASSES)[0].numpy() for config in ROWS.values())


def _painted(asked, labels, shades):
    painted = np.array([shades[int(label)] for label in labels.flat]).reshape(*labels.shape, 3)
    return 0.35 * np.asarray(asked.image) / 255 + 0.65 * painted
