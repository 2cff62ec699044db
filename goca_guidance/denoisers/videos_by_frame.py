"""Denoisers of videos whose layers read each frame by itself, and one place of all frames by further layers.

Frames lie side by side in the batch of the layers, and so in the records; the further layers have no map of a picture.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from goca_guidance.denoisers.base import Family, row
from goca_guidance.denoisers.unets import UNetFamily, XLFamily
from goca_guidance.denoisers.videos import CrossFamily


class ByFrame:
    """What they share: latents b c F H W, regions of each frame by itself, from a text that all of them have."""

    by_frame = True

    def size(self, given: Mapping[str, Any]) -> tuple[int, ...]:
        """Frames, height and width of the latent."""
        return tuple(self.sample(given).shape[2:])  # type: ignore[attr-defined]

    def latents(self, channels: int) -> tuple[int | None, ...] | None:
        return channels, None, None, None

    def grid(self, name: str, latent: tuple[int, ...]) -> tuple[int, ...]:
        return super().grid(name, latent[1:])  # type: ignore[misc]


class MotionFamily(ByFrame, UNetFamily):
    """`UNetMotionModel`: AnimateDiff. Pipelines repeat the text for each frame; `motion_modules` are not read."""

    pipeline = "AnimateDiffPipeline"
    modules = r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\..*"

    def text(self, given: Mapping[str, Any]) -> list[Float[Tensor, "b n c"]]:
        return [text[:: len(text) // len(self.sample(given))] for text in super().text(given)]


class MotionXLFamily(MotionFamily, XLFamily):
    """`UNetMotionModel` with size embeddings: AnimateDiff on Stable Diffusion XL."""

    pipeline = "AnimateDiffSDXLPipeline"


class LatteFamily(ByFrame, CrossFamily):
    """`LatteTransformer3DModel`, which repeats the text itself; `temporal_transformer_blocks` are not read."""


def motion_family(unet: Any) -> type[Family]:
    """The adapter of a `UNetMotionModel`, by its configuration."""
    return MotionFamily if unet.config.addition_embed_type is None else MotionXLFamily


# ---- rows ------------------------------------------------------------------------------------------------------------
VIDEOS_BY_FRAME: dict[str, type[Family]] = {
    "LatteTransformer3DModel": row(LatteFamily, pipeline="LattePipeline"),
}
