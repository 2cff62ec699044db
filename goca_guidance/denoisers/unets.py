"""U-Nets: several grids, each level's half the one's above."""

import math
import re
from dataclasses import replace
from functools import cached_property
from typing import Any

from goca_guidance.config import LayerPreset
from goca_guidance.denoisers.base import DenoiserCall, Family, self_attention_beside
from goca_guidance.method.records import AttentionView


# ---- Stable Diffusion ------------------------------------------------------------------------------------------------
_SD_BLOCKS = (  # Stable Diffusion 1.x and 2.x: three levels with attention down, two layers each; the middle; three up
    *(f"down_blocks.{level}.attentions.{layer}" for level in (0, 1, 2) for layer in (0, 1)),
    "mid_block.attentions.0",
    *(f"up_blocks.{level}.attentions.{layer}" for level in (1, 2, 3) for layer in (0, 1, 2)),
)
_SD_FINE = ("down_blocks.0.attentions.1.0", "up_blocks.3.attentions.0.0", "up_blocks.3.attentions.1.0")
_SDXL_DEPTHS = {  # Stable Diffusion XL: transformer blocks of each attention
    **{f"down_blocks.{level}.attentions.{layer}": depth for level, depth in ((1, 2), (2, 10)) for layer in (0, 1)},
    "mid_block.attentions.0": 10,
    **{f"up_blocks.{level}.attentions.{layer}": depth for level, depth in ((0, 10), (1, 2)) for layer in (0, 1, 2)},
}
_SDXL_FINE = (
    *(f"down_blocks.1.attentions.0.{block}" for block in (0, 1)),
    *(f"up_blocks.1.attentions.{layer}" for layer in ("0.0", "0.1", "1.0", "1.1", "2.0")),
)


class UNetFamily(Family):
    """`UNet2DConditionModel`: Stable Diffusion 1.x and 2.x, and other U-Nets with text cross-attention."""

    pipeline = "StableDiffusionPipeline"

    @cached_property
    def attention_modules(self) -> dict[str, Any]:
        """Every attention module by its full name, in network order: a U-Net registers its middle last."""
        order = ("down_blocks", "mid_block", "up_blocks")
        found = super().attention_modules
        return dict(sorted(found.items(), key=lambda item: order.index(item[0].partition(".")[0])))

    @cached_property
    def preset(self) -> LayerPreset:
        """Stable Diffusion's by its layout, else a preset that is fitted to the U-Net's grids."""
        if self._text_layers() != tuple(f"{block}.transformer_blocks.0.attn2" for block in _SD_BLOCKS):
            return self._generic_preset()
        named = self._named_preset("up_blocks.2.attentions.1.0", _SD_FINE)
        return replace(named, manual=named.text[4:12])  # down_blocks.2 to up_blocks.2.attentions.1

    def _named_preset(self, reference, refine):
        text = self._text_layers()
        reference, *refine = (_unet_layer(block) for block in (reference, *refine))
        return LayerPreset(text, self_attention_beside(text), reference, self_attention_beside(refine))

    def _generic_preset(self) -> LayerPreset:
        text = self._text_layers()
        return self._fitted(text, self_attention_beside(text))

    def _fitted(self, text: tuple[str, ...], beside: tuple[str, ...]) -> LayerPreset:
        """Ours: the finest grid refines, and the reference is the middle layer of half the latent's grid.

        Stable Diffusion's and XL's presets have their reference there; a reference of the finest grid agrees with itself more
        than with what localises; it is taken where no layer has that grid. Grids may lie further apart than Stable
        Diffusion's, so rows are normalised: else the coarsest layers win. Order and timestep are those that served the
        embedded model best on validation scenes.
        """
        level = min(map(self._level, text))
        finest = [name for name, of_text in zip(beside, text, strict=True) if self._level(of_text) == level]
        halved = [name for name in text if self._level(name) == 1] or [n for n in text if self._level(n) == level]
        refine, reference = tuple(dict.fromkeys(finest[: max(1, len(text) // 3)])), halved[len(halved) // 2]
        return LayerPreset(text, beside, reference, refine, order=1, timestep=50, row_normalise=True)

    def _level(self, name: str) -> int:
        """How often the grid is halved between the latent and a layer."""
        kind, index = name.split(".")[:2]
        deepest = len(self.denoiser.config.block_out_channels) - 1
        if kind == "mid_block":
            return deepest
        return int(index) if kind == "down_blocks" else deepest - int(index)

    def grid(self, name: str, latent: tuple[int, ...]) -> tuple[int, ...]:
        """Height and width of a layer's pixel tokens: the latent's, halved and rounded up so often as the layer is deep."""
        shrink = 2 ** self._level(name)
        return -(-latent[0] // shrink), -(-latent[1] // shrink)


class XLFamily(UNetFamily):
    """`UNet2DConditionModel` with size embeddings: Stable Diffusion XL. Two encoders share the token positions."""

    pipeline = "StableDiffusionXLPipeline"
    encoders = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
    side_by_side = True
    unconditional_sink = False  # without a negative prompt the unconditional text is all zeros, and no token differs

    @cached_property
    def preset(self) -> LayerPreset:
        """Stable Diffusion XL's by its layout, else a preset that is fitted to the U-Net's grids."""
        layout = tuple(_unet_layer(f"{block}.{i}") for block, depth in _SDXL_DEPTHS.items() for i in range(depth))
        if self._text_layers() != layout:
            return self._generic_preset()
        return self._named_preset("up_blocks.1.attentions.0.0", _SDXL_FINE)


def _unet_layer(place: str) -> str:
    """`up_blocks.1.attentions.0.1` to the full name of that transformer block's cross-attention."""
    attention, _, block = place.rpartition(".")
    return f"{attention}.transformer_blocks.{block}.attn2"


# ---- others ----------------------------------------------------------------------------------------------------------
class AddedKeysFamily(UNetFamily):
    """`UNet2DConditionModel` whose text is keys before the pixels' own (`add_k_proj`), asked by pixels alone: DeepFloyd IF.

    Nobody has picked layers, or looked for the sink.
    """

    pipeline = "IFPipeline"
    sink = "end"
    sink_measured = False
    unconditional_sink = False
    modules = r"(down_blocks|mid_block|up_blocks)\..*attentions\.\d+"

    @cached_property
    def preset(self) -> LayerPreset:
        names = tuple(self.attention_modules)
        return self._fitted(names, names)

    def view(self, call: DenoiserCall, name: str, queries: int, keys: int) -> AttentionView | None:
        grid = self.grid(name, call.latent)
        if (queries, keys) != (math.prod(grid), call.text + math.prod(grid)):
            return None
        return AttentionView(grid, slice(0, call.text), slice(call.text, keys))


class Kandinsky3Family(UNetFamily):
    """`Kandinsky3UNet`: in each block the first attention reads pixels, the others read text."""

    pipeline = "Kandinsky3Pipeline"
    sink = "end"
    sink_measured = False
    unconditional_sink = False
    modules = r"(down|up)_blocks\.\d+\.attentions\.\d+\.attention"

    @cached_property
    def preset(self) -> LayerPreset:
        text = tuple(name for name in self.attention_modules if not _is_first(name))
        return self._fitted(text, tuple(re.sub(r"\d+\.attention$", "0.attention", name) for name in text))

    def view(self, call: DenoiserCall, name: str, queries: int, keys: int) -> AttentionView | None:
        grid, pixels = self.grid(name, call.latent), _is_first(name)
        if (queries, keys) != (math.prod(grid), queries if pixels else call.text):
            return None
        return AttentionView(grid, image=slice(0, keys)) if pixels else AttentionView(grid, slice(0, keys))


def _is_first(name: str) -> bool:
    return name.endswith("attentions.0.attention")


class CascadeFamily(UNetFamily):
    """`StableCascadeUNet`, the prior: pixels, the prompt's tokens, and what CLIP makes of a whole prompt and of a picture."""

    encoders = (("text_encoder", "tokenizer"),)
    sink_measured = False
    unconditional_sink = False
    modules = r"(down|up)_blocks\..*\.attention"
    texts = ("clip_text",)
    branches = (1, 0)

    @cached_property
    def preset(self) -> LayerPreset:
        if self.denoiser.config.clip_text_in_channels is None:
            raise ValueError(
                "Expected a denoiser that reads the tokens of the prompt, but Stable Cascade's decoder gets one vector of "
                "them: guide the prior, and use the stock decoder."
            )
        names = tuple(self.attention_modules)
        return self._fitted(names, names)

    def _level(self, name: str) -> int:
        """Levels may have one grid (`switch_level`)."""
        kind, index = name.split(".")[:2]
        config = self.denoiser.config
        level = int(index) if kind == "down_blocks" else len(config.block_out_channels) - 1 - int(index)
        return level if config.switch_level is None else sum(config.switch_level[:level])

    def grid(self, name: str, latent: tuple[int, ...]) -> tuple[int, ...]:
        shrink = self.patch * 2 ** self._level(name)
        return latent[0] // shrink, latent[1] // shrink

    def view(self, call: DenoiserCall, name: str, queries: int, keys: int) -> AttentionView | None:
        grid = self.grid(name, call.latent)
        if queries != (pixels := math.prod(grid)) or keys < pixels + call.text:
            return None
        return AttentionView(grid, slice(pixels, pixels + call.text), slice(0, pixels))


# ---- choice ----------------------------------------------------------------------------------------------------------
UNETS: dict[str, type[Family]] = {"Kandinsky3UNet": Kandinsky3Family, "StableCascadeUNet": CascadeFamily}


def unet_family(unet: Any) -> type[Family]:
    """The adapter of a `UNet2DConditionModel`, by its configuration."""
    config = unet.config
    if config.encoder_hid_dim_type in ("image_proj", "text_image_proj"):
        raise ValueError(
            "Expected a denoiser that reads the tokens of the prompt alone, but Kandinsky 2's is shown the embedding of an "
            "image: use the stock pipeline."
        )
    if "SimpleCrossAttn" in str(config.mid_block_type):
        return AddedKeysFamily
    return UNetFamily if config.addition_embed_type is None else XLFamily
