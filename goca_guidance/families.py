"""What differs between denoisers: names of attention layers, token order, token grid, presets. Nothing else knows families."""

from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from goca_guidance.config import LayerPreset, sibling


_SD_BLOCKS = (  # Stable Diffusion 1.x and 2.x: three levels with attention down, two layers each; the middle; three up
    *(f"down_blocks.{level}.attentions.{layer}" for level in (0, 1, 2) for layer in (0, 1)),
    "mid_block.attentions.0",
    *(f"up_blocks.{level}.attentions.{layer}" for level in (1, 2, 3) for layer in (0, 1, 2)),
)
_SD_FINE = ("down_blocks.0.attentions.1", "up_blocks.3.attentions.0", "up_blocks.3.attentions.1")


@dataclass(frozen=True)
class UNetFamily:
    """Adapter of `UNet2DConditionModel`: Stable Diffusion 1.x and 2.x, and other U-Nets with text cross-attention."""

    denoiser: UNet2DConditionModel

    sink_token = 0  # `<sos>`, which CLIP puts first: the token that looks at the background

    @cached_property
    def attention_modules(self) -> dict[str, torch.nn.Module]:
        """Every attention module by its full name, in network order."""
        blocks = (
            "down_blocks",
            "mid_block",
            "up_blocks",
        )  # others, such as an image prompt's projection, are no layers
        named = [(name, m) for name, m in self.denoiser.named_modules() if isinstance(m, Attention)]
        return {name: m for block in blocks for name, m in named if name.startswith(block)}

    @cached_property
    def preset(self) -> LayerPreset:
        """Stable Diffusion 1.x / 2.x by their layout, else the generic preset."""
        cross = tuple(name for name in self.attention_modules if name.endswith(".attn2"))
        if not cross:
            raise ValueError("Expected a U-Net with text cross-attention layers (`attn2`), but this one has none.")
        if tuple(name.partition(".transformer_blocks.0.attn2")[0] for name in cross) != _SD_BLOCKS:
            return self._generic_preset(cross)
        fine = tuple(f"{block}.transformer_blocks.0.attn1" for block in _SD_FINE)
        return LayerPreset(cross, "up_blocks.2.attentions.1.transformer_blocks.0.attn2", fine, order=2, timestep=100)

    def _generic_preset(self, cross: tuple[str, ...]) -> LayerPreset:
        """Ours, for a U-Net that no preset names: the finest grid refines, and its middle layer is the reference.

        Its grids may lie further apart than Stable Diffusion's, so rows are normalised: else the coarsest layers win. Order
        and timestep are those that served the embedded model best on validation scenes.
        """
        finest = min(map(self._level, cross))
        names = [name for name in cross if self._level(name) == finest]
        fine = tuple(map(sibling, names[: max(1, len(cross) // 3)]))
        return LayerPreset(cross, names[len(names) // 2], fine, order=1, timestep=50, row_normalise=True)

    def _level(self, name: str) -> int:
        """How often the grid is halved between the latent and a layer."""
        kind, index = name.split(".")[:2]
        deepest = len(self.denoiser.config.block_out_channels) - 1
        if kind == "mid_block":
            return deepest
        return int(index) if kind == "down_blocks" else deepest - int(index)

    def grid(self, pixels: int, latent: tuple[int, int]) -> tuple[int, int]:
        """Height and width of a layer with so many pixel tokens: the latent's, halved and rounded up until it fits."""
        height, width = latent
        while height * width > pixels:
            height, width = -(-height // 2), -(-width // 2)
        if height * width != pixels:
            raise ValueError(f"Expected pixel tokens of a halved {latent} latent, but got {pixels}.")
        return height, width


def family_of(denoiser: torch.nn.Module) -> UNetFamily:
    """The adapter of a denoiser, a compiled one looked through."""
    denoiser = getattr(denoiser, "_orig_mod", denoiser)
    if not isinstance(denoiser, UNet2DConditionModel):
        raise ValueError(
            "Expected the denoiser to be a UNet2DConditionModel (Stable Diffusion 1.x or 2.x), but got "
            f"{type(denoiser).__name__}."
        )
    if denoiser.config.addition_embed_type is not None:
        raise ValueError(
            "Expected a U-Net of Stable Diffusion 1.x or 2.x, but got one with additional embeddings "
            f"({denoiser.config.addition_embed_type!r}, as Stable Diffusion XL has)."
        )
    return UNetFamily(denoiser)
