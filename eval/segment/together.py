"""Several configurations of GoCA that read one forward of the network, and share what they have in common of its attention."""

from collections.abc import Collection, Sequence
from copy import copy
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from goca_guidance import CRF, Background, GoCAConfig, GoCASCFGPipeline, Segmentation
from goca_guidance.config import LayerPreset
from goca_guidance.method.aggregation import Aggregation
from goca_guidance.method.records import AttentionRecord, TokenLayout
from goca_guidance.method.segmentor import GoCASegmentor


class Together:
    """A `ScoringSegmentor` that is one for each configuration: `found` gets the scores of each, the answer is the first's.

    Rows of the paper's ablation differ in how heads and layers are weighted and in rescaling alone. So maps of the words are
    made once for each weighing of heads, and agreements of layers and the self-attention that refines once. A configuration
    that differs otherwise reads all by itself.
    """

    def __init__(
        self,
        configs: Collection[GoCAConfig],
        found: dict[GoCAConfig, Float[Tensor, "b k H W"]],
        preset: LayerPreset,
        layout: TokenLayout,
    ):
        self.preset, self.layout, self.found = preset, layout, found
        self.segmentors = {config: GoCASegmentor(config, preset, layout) for config in configs}
        self.sharing = [config for config in configs if _ablates(config)]
        self.alone = [self.segmentors[config] for config in configs if not _ablates(config)]
        self.sources: dict[str, Aggregation] = {}  # by weighing of heads; the first has all that is shared
        for heads in dict.fromkeys(map(self._heads, self.sharing)):
            layers = "uniform" if self.sources else "agreement"
            self.sources[heads] = Aggregation(
                GoCAConfig(heads=heads, layers=layers), preset, layout.columns, refining=not self.sources, total=True
            )

    def _heads(self, config):
        return config.heads or self.preset.heads

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that must be observed."""
        return frozenset().union(*(reader.layers for reader in (*self.sources.values(), *self.alone)))

    @property
    def projected(self) -> frozenset[str]:
        """Names of the layers whose output projection is needed."""
        return frozenset().union(*(segmentor.projected for segmentor in self.segmentors.values()))

    def keep(self, record: AttentionRecord, branches: tuple[int, ...] = (1,)) -> None:
        """Take a record (see `Segmentor.keep`)."""
        for source in self.sources.values():
            if 1 in branches and record.name in source.layers:
                source.keep(record.branch(1, branches))
        for segmentor in self.alone:
            segmentor.keep(record, branches)

    def scores(self) -> Float[Tensor, "b k H W"]:
        """Of the first configuration."""
        for source in self.sources.values():
            source.weights()  # reduces what waits
        for config in self.sharing:
            self.segmentors[config]._conditional = self._read_as(config)
        self.found |= {config: segmentor.scores() for config, segmentor in self.segmentors.items()}
        return next(iter(self.found.values()))

    def _read_as(self, config) -> Aggregation:
        """What was read, as a configuration weighs it."""
        shared, own = next(iter(self.sources.values())), copy(self.sources[self._heads(config)])
        preset, refined = self.preset.reading(config.layers), ("_sum", "_large", "_refining", "_refining_keys")
        for name in (*refined, "_agreements", "finest", "uneven"):
            setattr(own, name, getattr(shared, name))
        own.config, own.preset = config, preset
        own._compared = frozenset(preset.self_attention if config.layers == "agreement" else ())
        chosen = [([name in preset.text for name in names], names, maps) for names, maps in own._maps]
        own._maps = [
            ([name for name in names if name in preset.text], maps[torch.tensor(kept, device=maps.device)])
            for kept, names, maps in chosen
            if any(kept)
        ]
        return own


def _ablates(config: GoCAConfig) -> bool:
    """Whether a configuration is a row of the ablation."""
    return replace(config, heads=None, layers="agreement", rescale=True) == GoCAConfig()


def segment_together(
    pipe: GoCASCFGPipeline,
    images: list[Image.Image],
    names: list[tuple[str, ...]],
    configs: Collection[GoCAConfig],
    words: tuple[str, ...] = (),
    **arguments,
) -> dict[GoCAConfig, Segmentation]:
    """What `pipe.segment` gives for each configuration, from one forward.

    `words`: background entities of all images, whose maps are merged before they are refined, as released.
    """
    found: dict[GoCAConfig, Tensor] = {}
    background = Background(words) if words else None
    first = pipe.segment(
        images,
        names,
        background=background,
        segmentor=lambda config, preset, layout: Together(configs, found, preset, layout),
        **arguments,
    )
    entities = 1 if words else 0
    return {
        config: replace(first, scores=scores[:, entities:], entities=scores[:, :entities])
        for config, scores in found.items()
    }


def joined_prompts(parts: Sequence[Segmentation]) -> Segmentation:
    """One segmentation of the same images by several prompts, each with as many names for all images."""
    first, *others = parts
    if not others:
        return first
    classes = tuple(
        tuple(name for names in each for name in names) for each in zip(*(p.classes for p in parts), strict=True)
    )
    return replace(first, scores=torch.cat([part.scores for part in parts], 1), classes=classes)


def labelled(
    segmentation: Segmentation, classes: tuple[str, ...], offset: float | None = None, crf: CRF | None = None
) -> list[Int[Tensor, "H W"]]:
    """Label maps as indices into some classes, which have the segmentation's names and its background's.

    `offset`: of the background, where there is one; None leaves the segmentation's. `crf`: behind the scores.
    """
    segmentation = replace(segmentation, crf=crf)
    if offset is not None and segmentation.background is not None:
        segmentation = replace(segmentation, background=replace(segmentation.background, offset=offset))
    asked = [torch.tensor([classes.index(name) for name in names]) for names in segmentation.classes]
    return [labels[each] for labels, each in zip(asked, segmentation.label_maps, strict=True)]
