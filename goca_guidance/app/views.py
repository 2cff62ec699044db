"""What the page shows of a step and of a segmentation, as values of Gradio's components. No Gradio here."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor

from goca_guidance.app.studio import Steps
from goca_guidance.pictures import colour, enlarged, fitted


SHOWN = 768  # pixels on a side of what has masks over it, each of which travels by itself
OVER, PALE = 0.65, 0.25  # how much masks cover, and those of the background

Annotated = tuple[Image.Image, list[tuple[np.ndarray, str]]]


def shown(image: Image.Image) -> Image.Image:
    """A picture for looking at: small ones enlarged, large ones reduced."""
    return fitted(enlarged(image), SHOWN)


def colours(names: Sequence[str]) -> dict[str, str]:
    """The colour of each name, as in the library's pictures."""
    return {name: to_hex(colour(number)) for number, name in enumerate(dict.fromkeys(map(plain, names)))}


def plain(name: str) -> str:
    """A token as one reads it: without the tokenizer's sign for the end of a word."""
    return name.removesuffix("</w>").strip("▁Ġ ") or name


def masks(
    image: Image.Image,
    names: Sequence[str],
    labels: Int[np.ndarray, "H W"],
    cover: Float[np.ndarray, "H W"] | None = None,
) -> Annotated:
    """The picture, and over it what each name covers; names that cover nothing are left out, and equal ones are one."""
    size = image.size
    index = _resized(labels.astype(np.int32), size)
    strength = np.full(index.shape, OVER) if cover is None else _resized(cover.astype(np.float32), size)
    found: dict[str, Any] = {}
    for number, name in enumerate(map(plain, names)):
        mask = np.where(index == number, strength, 0)
        if mask.any():
            found[name] = found.get(name, 0) + mask
    return image, [(mask, name) for name, mask in found.items()]


def regions_at(image: Image.Image, steps: Steps, step: int) -> Annotated:
    """Regions of one step over the picture; what is not foreground is pale."""
    cover = np.where(steps.foreground[step].numpy(), OVER, PALE)
    return masks(image, steps.names, steps.regions[step].numpy(), cover)


def heat(values: Float[Tensor, "H W"], low: float, high: float, size: tuple[int, int]) -> Image.Image:
    """A map in colours from dark (low) to bright (high), at a picture's size, its own pixels visible."""
    scaled = (values.float().numpy() - low) / max(high - low, 1e-6)
    painted = Image.fromarray((255 * colormaps["viridis"](scaled)[..., :3]).astype(np.uint8))
    return painted.resize(size, Image.Resampling.NEAREST)


def _resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.NEAREST))
