"""What each stage of GoCA (arXiv 2603.06178) does to one image, from one forward: numbers, and pictures of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from goca_guidance import pictures
from goca_guidance.config import GoCAConfig, LayerPreset
from goca_guidance.method.aggregation import Aggregation
from goca_guidance.method.goca import head_weights
from goca_guidance.method.records import AttentionRecord, TokenLayout
from goca_guidance.method.segmentor import GoCASegmentor
from goca_guidance.schema import checked


@dataclass(frozen=True)
class Explanation:
    """The stages of GoCA on one image.

    Args:
        image: the picture that was read.
        classes: the names, in the order of the maps.
        layers: the text layers, in network order.
        layer_maps: of each layer [k H W] at its own grid: attention from pixels to the words of each name, heads weighted.
        heads: [l h], weight of each head in its layer, mean over pixels; the heads of a layer sum to one.
        weights: [l], weight of each layer; they sum to one.
        stages: by name [k H W] in [0, 1]: "plain mean" (heads and layers alike, no rescaling, no refinement), "weighted",
            "rescaled", "refined".
        labels: H W, index into `classes`.
    """

    image: Image.Image
    classes: tuple[str, ...]
    layers: tuple[str, ...]
    layer_maps: tuple[Float[Tensor, "k _ _"], ...]
    heads: Float[Tensor, "l h"]
    weights: Float[Tensor, " l"]
    stages: dict[str, Float[Tensor, "k y x"]]
    labels: Int[Tensor, "H W"]

    def figures(self) -> dict[str, Figure]:
        """Pictures by name, in the order of the method."""
        names = pictures.without_common_end(self.layers)
        return {
            "layers": pictures.map_grid(self.layer_maps, self.classes, names),
            "weights": pictures.weights(self.heads, self.weights, names),
            "stages": pictures.map_grid(list(self.stages.values()), self.classes, list(self.stages), bounds=(0, 1)),
            "regions": pictures.overlay(
                pictures.enlarged(self.image), [self.labels], self.classes, ["the highest map of each pixel"]
            ),
        }

    def save(self, folder: str | Path) -> list[Path]:
        """Write the figures as PNG, numbered in their order; the paths."""
        named = enumerate(self.figures().items(), 1)
        return [pictures.save(figure, Path(folder) / f"{i}_{name}.png") for i, (name, figure) in named]


@checked
def explain(
    pipe: Any, image: Any, classes: Sequence[str], *, goca: GoCAConfig | None = None, **arguments
) -> Explanation:
    """Segment one image and keep what each stage of GoCA (arXiv 2603.06178) made of it.

    Args:
        pipe: a [`goca_guidance.GoCASCFGPipeline`].
        image: PIL, path or array.
        classes: names that the prompt holds.
        goca: how attention becomes maps.
        arguments: further ones of [`goca_guidance.GoCASCFGPipeline.segment`], but no background, and one noise.

    Returns:
        [`Explanation`].
    """
    made: list[Stages] = []

    def segmentor(config: GoCAConfig, preset: LayerPreset, layout: TokenLayout) -> "Stages":
        made.append(Stages(config, preset, layout))
        return made[-1]

    for name in ("background", "segmentor"):
        if arguments.get(name) is not None:
            raise ValueError(f"Expected no `{name}` to explain an image by its words: leave it out.")
    seg = pipe.segment(image, list(classes), goca=goca, segmentor=segmentor, **arguments)
    if len(seg.pictures) != 1 or len(made) != 1:
        raise ValueError(
            f"Expected one image and one noise to explain, but got {len(seg.pictures)} and {len(made)}: take one of them."
        )
    return Explanation(image=seg.pictures[0], classes=tuple(classes), labels=seg.label_maps[0], **made[0].found())


class Stages:
    """A `ScoringSegmentor` that keeps what lies between attention and scores; its answer is GoCA's."""

    def __init__(self, config: GoCAConfig, preset: LayerPreset, layout: TokenLayout):
        self.layout, self.preset = layout, preset.reading(config.layers)
        self.by_layer = {
            name: Aggregation(replace(config, layers="uniform"), self.preset.reading((name,)), layout.columns)
            for name in self.preset.text
        }
        unrefined = replace(config, refine_order=0)
        self.stages = {
            "plain mean": GoCASegmentor(GoCAConfig.vanilla(refine_order=0), preset, layout),
            "weighted": GoCASegmentor(replace(unrefined, rescale=False), preset, layout),
            "rescaled": GoCASegmentor(unrefined, preset, layout),
            "refined": GoCASegmentor(config, preset, layout),
        }
        self._heads: dict[str, Tensor] = {}
        self._scores: dict[str, Tensor] = {}

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that must be observed."""
        return frozenset().union(*(segmentor.layers for segmentor in self.stages.values()))

    @property
    def projected(self) -> frozenset[str]:
        """All text layers: the weight of their heads is shown whatever weighs them."""
        return frozenset(self.preset.text)

    def keep(self, record: AttentionRecord, branches: tuple[int, ...] = (1,)) -> None:
        """Take a record (see `Segmentor.keep`)."""
        for segmentor in self.stages.values():
            segmentor.keep(record, branches)
        if record.name in self.by_layer and 1 in branches:
            half = record.branch(1, branches)
            self.by_layer[record.name].keep(half)
            if half.output is not None and half.gram is not None:
                self._heads[record.name] = head_weights(half.output, [half.gram])[0].mean(-1).cpu()

    def scores(self) -> Float[Tensor, "b k *S"]:
        """GoCA's."""
        self._scores = {name: segmentor.scores() for name, segmentor in self.stages.items()}
        return self._scores["refined"]

    def found(self) -> dict[str, Any]:
        """Fields of an `Explanation`, of the first image."""
        maps = []
        for aggregation in self.by_layer.values():
            tokens, _ = aggregation.merged(aggregation.finest)
            maps.append(torch.einsum("m...,mk->k...", tokens[0], self.layout.groups[0]).cpu())
        return {
            "layers": tuple(self.preset.text),
            "layer_maps": tuple(maps),
            "heads": torch.stack([self._heads[name] for name in self.preset.text]),
            "weights": self.stages["refined"].weights()[0].cpu(),
            "stages": {name: scores[0].cpu() for name, scores in self._scores.items()},
        }
