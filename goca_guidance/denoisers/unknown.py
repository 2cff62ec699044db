"""A transformer with joint attention that no row of facts names: its layout is found out, see `hooks.probe`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from diffusers.utils import logging

from goca_guidance.config import LayerPreset
from goca_guidance.denoisers.base import DenoiserCall, all_layers
from goca_guidance.denoisers.joint import JointFamily
from goca_guidance.method.records import AttentionView


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Layout:
    """Where text and pixels stand in the sequence of a joint attention layer."""

    text: int
    pixels: int


class UnknownFamily(JointFamily):
    """A transformer without cross-attention layers. Before its first call nobody knows which of its layers are joint."""

    modules = r"[^.]*(block|layer)[^.]*\.\d+\..*"

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """By layer, filled by the probe; layers that are not joint are left out."""
        return {}

    @cached_property
    def attention_modules(self) -> dict[str, Any]:
        if not {*self.texts} & {*self._signature.parameters}:
            return {}
        return super().attention_modules

    @property
    def preset(self) -> LayerPreset:  # type: ignore[override]  # another one once the layouts are known
        names = tuple(self.layouts or self.attention_modules)
        if not names:
            raise ValueError(
                "Expected text cross-attention layers (`attn2` beside `attn1`), or joint attention, in the denoiser's "
                f"blocks, but {type(self.denoiser).__name__} has none, and no row of facts names it: use "
                "one of the supported families."
            )
        return all_layers(names, names, heads="uniform", features=self.features)

    def learn(self, layouts: Mapping[str, Layout]) -> None:
        """The probe's answer, or an error where it found none."""
        name = type(self.denoiser).__name__
        if not layouts:
            raise ValueError(
                f"Expected attention of {name} in which text and pixels stand apart, but no text token could be found in it, "
                "and no row of facts names it: use one of the supported families."
            )
        self.layouts.update(layouts)
        logger.warning(
            f"No row of facts is known for {name}: where its text stands was found by running it with another text, and all "
            "its joint attention layers are read. Look at the regions before you rely on them."
        )

    def view(self, call: DenoiserCall, name: str, queries: int, keys: int) -> AttentionView | None:
        if (layout := self.layouts.get(name)) is None:
            return None
        grid = self.grid(name, call.latent)
        pixels = slice(layout.pixels, layout.pixels + math.prod(grid))
        text = slice(layout.text, layout.text + call.text)
        return None if max(pixels.stop, text.stop) != keys else AttentionView(grid, text, pixels)
