"""Segmentation methods as rows of a table: each reads a batch of images with its prompts and answers with class scores.

goca           auto aggregation over heads and layers, per-pixel rescaling (arXiv 2603.06178)
vanilla        plain means over heads and layers, min-max only
manual         vanilla on the layers picked by hand: the paper's for Stable Diffusion 1.x, elsewhere those that a row names
fttm           as GoCA re-implements it: manual, then a dense CRF
fttm-paper     FTTM's own definition (arXiv 2309.04109): its layers, boxes, background rule and noises, then a dense CRF
diffsegmenter  one pass per class, weights by resolution, one refinement (arXiv 2309.02773)
diffcut        segments without names, given the best ones by Hungarian matching (arXiv 2406.02842)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from eval.common.processes import slices
from eval.prompts.sources import Entity, Prompt
from eval.segment.baselines import FTTM, DiffSegmenter
from goca_guidance import CRF, Background, GoCAConfig, GoCASCFGPipeline
from goca_guidance.schema import FILLED, checked


KINDS = ("offset", "constant", "max", "square")


@checked
@dataclass(frozen=True)
class BackgroundRule:
    """What the background scores: for each of the `values` v, with e the background entities' score and s the highest class's:
    "offset" v + e, "constant" v, "max" max(v, e), "square" (2 v - s)^2, which is FTTM's.

    `merged`: e comes from the highest of the entities' maps, taken before it is refined, as in GoCA's released code; else e is
    the highest of the entities' scores, each refined by itself.

    All values share one forward, and one count: they ascend, and what the background wins at one it wins at all above.
    """

    kind: Literal[*KINDS]
    values: Annotated[tuple[float, ...], FILLED]
    merged: bool = True

    def __post_init__(self):
        if list(self.values) != sorted(set(self.values)):
            raise ValueError(f"Expected `values` in ascending order, each once, but got {list(self.values)}.")
        if self.kind == "square" and self.values[0] < 0:
            raise ValueError(f"Expected values of at least 0 for this rule, but got {list(self.values)}.")

    def score(self, value: float, entity: Tensor, highest: Tensor) -> Tensor:
        """The background's score at each pixel."""
        if self.kind == "offset":
            return entity + value
        if self.kind == "constant":
            return torch.full_like(entity, value)
        return entity.clamp(min=value) if self.kind == "max" else (2 * value - highest) ** 2

    def margin(self, entity: Tensor, highest: Tensor) -> Tensor:
        """The value above which the background wins a pixel."""
        if self.kind == "offset":
            return highest - entity
        if self.kind == "constant":
            return highest
        if self.kind == "max":
            return highest.masked_fill(entity > highest, -torch.inf)
        return (highest + highest.sqrt()) / 2  # of (2 v - s)^2 > s, as v and s are not negative


@dataclass(frozen=True)
class Scores:
    """A method's answer for one image; nothing where no class was asked for.

    Args:
        maps: scores in [0, 1] of the classes `labels`.
        labels: indices into the benchmark's classes.
        background: the score of the background's entities, zeros where there are none.
        segments: numbers of nameless segments, instead of all of these.
    """

    maps: Float[Tensor, "k H W"] | None = None
    labels: tuple[int, ...] = ()
    background: Float[Tensor, "H W"] | None = None
    segments: Int[Tensor, "H W"] | None = None


@dataclass(frozen=True)
class Batch:
    """Images with their prompts, a seed for the noise of each, the names of all classes, and `BackgroundRule.merged`."""

    images: list[Image.Image]
    prompts: list[list[Prompt]]
    seeds: list[int]
    classes: tuple[str, ...]
    merged: bool = True

    def generators(self, which: Sequence[int]) -> list[torch.Generator]:
        """One for each of some images: an image's noise depends on its seed alone."""
        return [torch.Generator().manual_seed(self.seeds[image]) for image in which]


@dataclass(frozen=True)
class Method:
    """How a method reads, and what of the experiment's settings it overrides.

    Args:
        answer: (pipeline, batch, config, prompts in a forward, settings) to the scores of each image.
        config: how attention becomes maps.
        nameless: it answers with segments.
        stretched: each class's scores reach from 0 to 1 at the picture's size.
        crf: constants of the dense CRF that refines the label map, where one does.
        timestep, num_noises: None leaves the experiment's.
        rule: the method's background rule; None leaves the experiment's.
        extra: settings of `answer` that no other method has.
    """

    answer: Callable[..., list[Scores]]
    config: GoCAConfig = field(default_factory=GoCAConfig)
    nameless: bool = False
    stretched: bool = False
    crf: CRF | None = None
    timestep: int | None = None
    num_noises: int | None = None
    rule: BackgroundRule | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def by_words(pipe: GoCASCFGPipeline, batch: Batch, config: GoCAConfig, size: int, **settings: Any) -> list[Scores]:
    """All classes of a prompt in one forward; the class score is the highest of its entities'."""
    asked = [
        (image, prompt) for image, prompts in enumerate(batch.prompts) if labels_asked(prompts) for prompt in prompts
    ]
    return _answers(pipe, batch, asked, size, goca=config, **settings)


def by_class(
    pipe: GoCASCFGPipeline,
    batch: Batch,
    config: GoCAConfig,
    size: int,
    template: str,
    grid_weights: Sequence[float] | None,
    **settings: Any,
) -> list[Scores]:
    """DiffSegmenter: a forward for each class, whose name stands in the `template` at {}."""
    asked = []
    for image, prompts in enumerate(batch.prompts):
        for label in sorted(labels_asked(prompts)):
            name = batch.classes[label]
            asked.append((image, Prompt(template.format(name), (Entity(name, label),))))
    segmentor = partial(DiffSegmenter, grid_weights=grid_weights)
    return _answers(pipe, batch, asked, size, goca=config, segmentor=segmentor, **settings)


def by_sentence(
    pipe: GoCASCFGPipeline,
    batch: Batch,
    config: GoCAConfig,
    size: int,
    template: str,
    text_layers: Sequence[str] | None,
    self_layer: str | None,
    **settings: Any,
) -> list[Scores]:
    """FTTM: the list of all entities stands in the `template` at {}."""
    sentences = [
        [replace(prompt, text=template.format(prompt.text)) for prompt in prompts] for prompts in batch.prompts
    ]
    segmentor = partial(FTTM, text_layers=text_layers, self_layer=self_layer)
    return by_words(pipe, replace(batch, prompts=sentences), config, size, segmentor=segmentor, **settings)


def by_cut(
    pipe: GoCASCFGPipeline, batch: Batch, config: GoCAConfig, size: int, num_noises: int, **settings: Any
) -> list[Scores]:
    """DiffCut: no words, and one noise."""
    found = []
    for images in slices(range(len(batch.images)), size):
        pictures = [batch.images[i] for i in images]
        found += pipe.discover(pictures, generator=batch.generators(images), **settings)
    return [Scores(segments=segments) for segments in found]


def _answers(pipe, batch, asked, size, **settings) -> list[Scores]:
    """Prompts of several images, `size` of them in a forward."""
    maps: list[dict[int | None, Tensor]] = [{} for _ in batch.images]

    def note(image, label, score):
        known = maps[image].get(label)
        maps[image][label] = score if known is None else torch.maximum(known, score)

    for part in slices(asked, size):
        images, prompts = zip(*part, strict=True)
        named = [[e for e in prompt.entities if e.label is not None] or prompt.entities for prompt in prompts]
        others = tuple(
            tuple(e.words for e in prompt.entities if e not in of_prompt)
            for prompt, of_prompt in zip(prompts, named, strict=True)
        )
        found = pipe.segment(
            [batch.images[i] for i in images],
            [[entity.words for entity in of_prompt] for of_prompt in named],
            prompt=[prompt.text for prompt in prompts],
            generator=batch.generators(images),
            background=Background(entities=others, merged=batch.merged) if any(others) else None,
            **settings,
        )
        for row, (image, of_prompt) in enumerate(zip(images, named, strict=True)):
            for entity, score in zip(of_prompt, found.scores[row], strict=False):  # padded where others ask for more
                note(image, entity.label, score)
            for score in found.entities[row]:
                note(image, None, score)
    return [_scores(found) for found in maps]


def labels_asked(prompts: Sequence[Prompt]) -> set[int]:
    """The classes that an image's prompts ask for."""
    return {entity.label for prompt in prompts for entity in prompt.entities if entity.label is not None}


def _scores(maps) -> Scores:
    labels = tuple(sorted(label for label in maps if label is not None))
    if not labels:
        return Scores()
    stacked = torch.stack([maps[label] for label in labels])
    return Scores(stacked, labels, maps.get(None, torch.zeros_like(stacked[0])))


METHODS = {
    "goca": Method(by_words),
    "vanilla": Method(by_words, GoCAConfig.vanilla()),
    "manual": Method(by_words, GoCAConfig.vanilla(layers="manual")),
    "fttm": Method(by_words, GoCAConfig.vanilla(layers="manual"), crf=CRF()),
    "fttm-paper": Method(
        by_sentence, crf=CRF(), timestep=150, num_noises=10, rule=BackgroundRule("square", (0.5,)),
        extra={"template": "a photo including {}.", "text_layers": None, "self_layer": None},
    ),
    "diffsegmenter": Method(
        by_class, stretched=True, rule=BackgroundRule("constant", tuple(round(0.3 + 0.01 * i, 2) for i in range(45))),
        extra={"template": "a photograph of {}", "grid_weights": None},
    ),
    "diffcut": Method(by_cut, nameless=True, timestep=50, extra={"threshold": 0.5, "alpha": 10.0, "layer": None}),
}  # fmt: skip
