"""Segmentation of real images: conditional forwards of the stock pipeline on a noised image (GoCA, section on setup)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints
from unicodedata import category

import numpy as np
import torch
from diffusers import DiffusionPipeline
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from goca_guidance.config import CRF, Background, GoCAConfig
from goca_guidance.denoisers.layouts import class_layout, class_prompt
from goca_guidance.files import Format, inline
from goca_guidance.formats import Segmented, write
from goca_guidance.formats import overlay as draw
from goca_guidance.hooks.observer import check_seen
from goca_guidance.method.crf import labels_by_crf
from goca_guidance.method.maps import resize
from goca_guidance.method.records import AttentionRecord
from goca_guidance.method.segmentor import GoCASegmentor, ScoringSegmentor
from goca_guidance.real_images.forwards import Forwards, check_further, noised
from goca_guidance.schema import Count, checked, read


if TYPE_CHECKING:
    import goca_guidance.pictures


@dataclass(frozen=True)
class Segmentation:
    """Segmentation of real images.

    `scores` b k H W: float32 in [0, 1] at the working size, one map per class (background not included); zeros beyond an
    image's own number of classes.
    `classes`: the names, one tuple of them for each image where the call named them so; "background" is the last one where
    a background rule was given.
    `entities` b e H W: scores of the background entities, or the one that they share (`Background.merged`). `sizes`: height
    and width of each image. `crf` moves the label maps' borders to those of the `pictures`, which are RGB.
    """

    scores: Float[Tensor, "b k H W"]
    classes: tuple[str, ...] | tuple[tuple[str, ...], ...]
    sizes: tuple[tuple[int, int], ...]
    background: Background | None
    entities: Float[Tensor, "b e H W"]
    pictures: tuple[Image.Image, ...] = ()
    crf: CRF | None = None

    def __post_init__(self):
        read("background", self.background, Background | None)
        if self.background is not None and self.background.entities and not self.entities.shape[1]:
            raise ValueError(
                "Expected a `background` without entities, because none were segmented, but got "
                f"{', '.join(self.background.entities)}: segment again, with `background`."
            )
        if self.crf is not None and len(self.pictures) != len(self.sizes):
            raise ValueError(f"Expected {len(self.sizes)} pictures beside a `crf`, but got {len(self.pictures)}.")

    @cached_property
    def label_maps(self) -> list[Int[Tensor, "_ _"]]:
        """One H W int64 tensor for each image, at that image's own size, on the CPU: an index into its classes.

        Made when first asked for. `dataclasses.replace(segmentation, background=..., crf=...)` applies others.
        """
        pairs = zip(self.scores.split(1), self.entities.split(1), strict=True)
        shared = not isinstance(self.classes[0], tuple)
        names = [self.classes] * len(self.sizes) if shared else self.classes
        counts = [len(of_image) - (self.background is not None) for of_image in names]
        every = [
            _with_background(scores[:, :count], entities, self.background, size)
            for (scores, entities), count, size in zip(pairs, counts, self.sizes, strict=True)
        ]
        if self.crf is None:
            return [scores.argmax(0).cpu() for scores in every]
        pictures = [torch.from_numpy(np.array(picture)) for picture in self.pictures]
        return [labels_by_crf(*pair, self.crf) for pair in zip(every, pictures, strict=True)]

    @checked
    def mask(self, name: str, image: int = 0) -> Bool[Tensor, "_ _"]:
        """Where a class, or "background", is: H W at the image's own size, on the CPU. `image`: which one, from 0."""
        classes = self.segmented(image).classes
        if name not in classes:
            raise ValueError(f"Expected a class of the segmentation ({', '.join(classes)}), but got {name!r}.")
        return self.label_maps[image] == classes.index(name)

    def overlay(self, image: int = 0) -> "goca_guidance.pictures.Drawing":
        """A figure: the picture, and beside it the classes painted over it, with a legend. `image`: which one, from 0."""
        return draw(self.segmented(image))

    @checked
    def save(
        self, folder: str | Path, formats: Sequence[Format] = ("overlay", "labels"), names: Sequence[str] = ()
    ) -> list[Path]:
        """Write files: of one image into the folder itself, of several into a folder of each, NAME or 1, 2, ...

        Args:
            folder: is made where it is missing; files of these names in it are replaced, each when it is whole.
            formats: "overlay" (overlay.png, to look at), "labels" (labels.png, a palette picture of indices, and classes.txt),
                "masks" (a black and white picture of each class), "cutouts" (each class with the rest transparent), "coco"
                (coco.json, run lengths; needs pycocotools), "scores" (scores.npz, the maps before the decision).
            names: of the images, one for each.

        Returns:
            The folder of each image.
        """
        count = len(self.sizes)
        if names and len(names) != count:
            raise ValueError(f"Expected one name for each of the {count} images, but got {len(names)}.")
        folders = [Path(folder)] if count == 1 and not names else [
            Path(folder) / name for name in names or map(str, range(1, count + 1))
        ]  # fmt: skip
        for image, (place, name) in enumerate(zip(folders, names or [""] * count, strict=True)):
            write(self.segmented(image, name), place, formats)
        return folders

    def _repr_html_(self) -> str:
        """In a notebook: the first images, painted."""
        return "".join(inline(self.overlay(image)._repr_png_(), "png") for image in range(min(4, len(self.sizes))))

    def segmented(self, image: int, name: str = "") -> Segmented:
        """One image, as it is written and drawn; `name`: of its file."""
        if not -len(self.sizes) <= image < len(self.sizes):
            raise ValueError(f"Expected the number of an image from 0 to {len(self.sizes) - 1}, but got {image}.")
        if len(self.pictures) != len(self.sizes):
            raise ValueError("Expected the `pictures` beside the scores, as `segment` gives them, but got none.")
        classes: Any = self.classes[image] if isinstance(self.classes[0], tuple) else self.classes
        has_background = self.background is not None
        scores = self.scores[image, : len(classes) - has_background]
        return Segmented(self.pictures[image], self.label_maps[image], classes, scores, has_background, name)


@torch.no_grad()
@checked
def segment(
    pipe: DiffusionPipeline,
    stock: type[DiffusionPipeline],
    images,
    classes: Sequence[str] | Sequence[Sequence[str]],
    *,
    prompt: str | Sequence[str] | None = None,
    timestep: int | Sequence[int] | None = None,
    num_noises: Count = 1,
    generator: torch.Generator | list[torch.Generator] | None = None,
    background: float | Sequence[str] | Background | None = None,
    height: Count | None = None,
    width: Count | None = None,
    goca: GoCAConfig | None = None,
    segmentor: Callable[..., ScoringSegmentor] = GoCASegmentor,
    crf: CRF | None = None,
    **arguments,
) -> Segmentation:
    """Segment real images by class names (GoCA, arXiv 2603.06178): noise at `timestep`, one forward, regions, argmax.

    `pipe` is the pipeline whose components are used, `stock` the text-to-image class that runs them; the other arguments are
    those of [`goca_guidance.GoCASCFGPipeline.segment`].
    """
    rule = None if background is None else Background.of(background)
    entities = rule.entities if rule else ()
    groups = _checked_names(classes, entities)
    goca = goca or GoCAConfig()
    check_further("segment", stock, arguments, get_type_hints(segment, include_extras=True))
    timestep = goca.timestep if timestep is None else timestep
    noisy = noised(pipe, images, timestep, num_noises, generator, height, width)
    shared, count = isinstance(groups[0], str), len(noisy.pictures)
    each = _one_for_each([groups] if shared else groups, count, "list of class names")
    others = _one_for_each(_groups(entities), count, "list of background names")
    if prompt is None:
        prompt = [class_prompt([*names, *extra]) for names, extra in zip(each, others, strict=True)]
    prompts = _one_for_each([prompt] if isinstance(prompt, str) else prompt, count, "prompt")
    # Entities first, as many of each image, "" for none: `scores` is cut behind them. Images of fewer classes are padded.
    most = max(map(len, others))
    asked = [[*extra, *[""] * (most - len(extra)), *names] for names, extra in zip(each, others, strict=True)]
    merged = most if rule and rule.merged else 0
    forwards = ClassForwards(pipe, noisy.family, asked, goca, segmentor, merged)
    scores = forwards.run(stock, prompts, noisy.samples, noisy.size, arguments)
    if not torch.isfinite(scores).all():
        raise ValueError("Expected finite attention, but the scores hold NaN or infinity: use float32 or bfloat16.")
    last = () if rule is None else ("background",)
    named = tuple((*names, *last) for names in each)
    sizes = tuple(picture.size[::-1] for picture in noisy.pictures)
    entity_scores, scores = scores.tensor_split([scores.shape[1] - max(map(len, each))], 1)
    pictures = tuple(noisy.pictures)
    return Segmentation(scores, named[0] if shared else named, sizes, rule, entity_scores, pictures, crf)


# ---- input -----------------------------------------------------------------------------------------------------------
def _checked_names(classes, entities) -> list:
    """The names, in one list or in one for each image, none of which is empty or holds a name twice."""
    groups, others = _groups(classes), _groups(entities)
    one_for_all = 1 in (len(groups), len(others))
    for group, extra in product(groups, others) if one_for_all else zip(groups, others, strict=False):
        names = [*group, *extra]
        if not group or not all(map(_is_named, names)):
            raise ValueError(f"Expected at least one class name and no empty ones, but got {names}.")
        spelled = [" ".join(name.lower().split()) for name in names]
        if repeated := sorted({name for name in spelled if spelled.count(name) > 1}):
            raise ValueError(
                f"Expected every class and background name once, but got {', '.join(repeated)} more than once."
            )
    return list(classes)


def _is_named(name: str) -> bool:
    """Whether anything of a name is left without commas, spaces of every kind and characters of no width."""
    return any(category(letter)[0] in "LNPS" for letter in name.replace(",", ""))


def _groups(names) -> list:
    """Names for all images as the only group, or the groups of each."""
    return [names] if all(isinstance(name, str) for name in names) else list(names)


def _one_for_each(given, count, what) -> list:
    """A list with one element for each image, from one or from so many."""
    given = list(given)
    if len(given) not in (1, count):
        raise ValueError(f"Expected one {what}, or one for each of the {count} images, but got {len(given)}.")
    return given * count if len(given) == 1 else given


# ---- the forwards ----------------------------------------------------------------------------------------------------
class ClassForwards(Forwards):
    """Scores of each image's class names, [b k H W]."""

    def __init__(self, pipe, family, names: Sequence[Sequence[str]], goca: GoCAConfig, segmentor, merged: int = 0):
        super().__init__(pipe, family)
        self.names, self.goca, self.make = names, goca, segmentor
        self.merged = merged  # so many names, the first ones, are background entities that share one score
        self.layout: Any = None  # a `TokenLayout`, once the text was read

    def begin(self, device: torch.device) -> None:
        if self.layout is None:
            self.layout = class_layout(self.encoded(self.prompts), self.names, self.merged).to(device)
        self.segmentor = self.make(self.goca, self.family.preset, self.layout)
        self.observer.projected = self.segmentor.projected
        self.observer.seen.clear()

    def on_attention(self, record: AttentionRecord) -> None:
        self.segmentor.keep(record)

    def result(self) -> Float[Tensor, "b k H W"]:
        check_seen(self.segmentor.layers, self.observer.seen)
        with torch.autocast(self.layout.groups.device.type, enabled=False):
            scores = self.segmentor.scores()
        self.segmentor = None
        return scores


# ---- output ----------------------------------------------------------------------------------------------------------
def _with_background(scores, entities, rule, size) -> Float[Tensor, "k H W"]:
    """Scores at the image's size, the background's last: they are resized, never the labels."""
    scores = resize(scores, size)
    if rule is not None:
        if rule.entities:
            highest = resize(entities, size).amax(1, keepdim=True)
            background = highest + rule.offset if rule.threshold is None else highest.clamp(min=rule.threshold)
        else:
            background = torch.full_like(scores[:, :1], rule.threshold)
        scores = torch.cat([scores, background], 1)
    return scores[0]
