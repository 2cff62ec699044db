"""The choices, as frozen dataclasses: the only configuration schema of the project."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Annotated, Literal

from goca_guidance.schema import FILLED, ODD, Count, Positive, at_least, between, checked, read


Size = Annotated[int, ODD, at_least(1)]
Weighing = Literal["contribution", "uniform"]


@checked
@dataclass(frozen=True)
class GoCAConfig:
    """How attention becomes regions (GoCA, arXiv 2603.06178). The defaults are the paper's method.

    Args:
        heads: "contribution" weights each head by its share of the layer's output; "uniform" is the plain mean. None takes
            the family's preset: "uniform" for Flux and HunyuanDiT, as released, else "contribution".
        layers: "agreement" weights each layer by its likeness to the pseudo self-attention; "uniform" is the plain mean;
            "manual" the mean of those that the papers pick by hand, of Stable Diffusion 1.x alone; names give the mean of
            these, as in `layers=["mid_block", "up_blocks.1.attentions.0"]`.
        row_normalise: let every resized self-attention row sum to one before the layers are compared. Off in the
            released code, where a coarse layer of r x r weighs (R / r)^2 more. None takes the family's preset.
        reference_channels: keep the first few channels of the dense features; 1 is what the released benchmark code does.
        rescale: divide by the pixel's sum over content tokens; off leaves min-max only.
        drop_stop_words: in generation, articles, determiners, pronouns, prepositions, particles, conjunctions, auxiliaries
            and signs form no region (the paper's rule), unless the prompt has no other words; off keeps every token that is
            not special (the released rule).
        refine_order: applications of the self-attention to the maps; None takes the family's preset.
        blur_size, blur_sigma: the Gaussian before min-max; sigma in pixels of a 64 x 64 map, as the paper's maps are.
        agreement_rows: compare layers in so many rows of the self-attention, the same random ones at every call; None
            takes the family's preset: 1024 for videos, else all. In joint attention of images all rows are needed for
            the words, and it saves time with fused kernels only. Error: docs/speed.md.
        working_size: longer side, in pixel tokens, of the grid to which maps are averaged before they are rescaled and
            refined, and at whose pixels alone self-attention is asked; a video keeps half as many frames at the most. None
            takes the family's preset: 24 for videos, else the finest grid. Error: docs/speed.md.
        timestep: of 1000, at which a real image is noised to be segmented; None takes the family's preset.
    """

    heads: Weighing | None = None
    layers: Literal["agreement", "uniform", "manual"] | Annotated[tuple[str, ...], FILLED] = "agreement"
    row_normalise: bool | None = None
    reference_channels: Count | None = None
    rescale: bool = True
    drop_stop_words: bool = True
    refine_order: Annotated[int, at_least(0)] | None = None
    blur_size: Size = 5
    blur_sigma: Positive = 1.1
    agreement_rows: Count | None = None
    working_size: Count | None = None
    timestep: Annotated[int, between(0, 999)] | None = None

    @classmethod
    def vanilla(cls, **changes) -> "GoCAConfig":
        """The uniform baseline: plain means over heads and layers, no rescaling; blurred and refined as GoCA's maps are."""
        return replace(cls(heads="uniform", layers="uniform", rescale=False), **changes)

    @classmethod
    def released(cls, model: str | None = None, **changes) -> "GoCAConfig":
        """The configuration of the released code, the single-channel dense features of its benchmarks included.

        It is whole on the models of `RELEASED`, whose presets have the released layers: their heads, order and timestep are
        released too, and maps of 64 x 64, which all of them have at their native size but PixArt-alpha (32 x 32), are blurred
        as there. On another denoiser these three are the preset's, so ours, unless a `model` of `RELEASED` says them. The
        release's own generation code keeps all channels (`reference_channels=None`).
        """
        if model is not None and model not in RELEASED:
            raise ValueError(f"Expected a model among {', '.join(RELEASED)}, but got {model!r}.")
        config = cls(row_normalise=False, reference_channels=1, drop_stop_words=False)
        if model is not None:
            heads, order, timestep = RELEASED[model]
            config = replace(config, heads=heads, refine_order=order, timestep=timestep)
        return replace(config, **changes)


# Heads, order of refinement and timestep of GoCA's release, by model (method, presets).
RELEASED: dict[str, tuple[Weighing, int, int]] = {
    "sd-1.5": ("contribution", 2, 100),
    "sdxl": ("contribution", 2, 100),
    "pixart-alpha": ("contribution", 5, 100),
    "pixart-sigma": ("contribution", 5, 100),
    "hunyuandit": ("uniform", 4, 100),
    "flux.1": ("uniform", 2, 150),
}


@checked
@dataclass(frozen=True)
class SCFGConfig:
    """How regions become a guidance map (S-CFG, arXiv 2404.05384).

    Args:
        rate_min, rate_max: limits of the rate of a region. (1, 1) is plain classifier-free guidance, bit for bit, and no
            ceiling applies.
        ceiling: no pixel's guidance (scale times rate) exceeds it.
        smooth_size, smooth_sigma: Gaussian over the rate map, in latent pixels.
        segmentor: "goca", or "s-cfg" for the segmentor of the S-CFG paper itself, whose foreground is its own.
        foreground: where GoCA's regions find it. "released": where the sink token's refined map, of the unconditional
            prediction if its text has such a token, is low. "conditional" (ours): where that token's score as a region of the
            conditional prediction is low, for which the unconditional one is not read.
        variance_channels: let the norm of the guidance run over a learned variance too, where the denoiser predicts one
            (PixArt), as the released code of GoCA does.
        every: find regions at each `every`-th guided step, and guide the steps between by the last ones found. Error:
            docs/speed.md.
        equal_mean: divide the rate map of each image by its mean, weighted by the strength of the guidance (ours): guidance
            is moved between pixels, and as strong in the mean as without regions. It comes last, behind limits and ceiling.
    """

    rate_min: Positive = 0.8
    rate_max: Positive = 3.0
    ceiling: Positive = 15.0
    smooth_size: Size = 3
    smooth_sigma: Positive = 0.5**0.5
    segmentor: Literal["goca", "s-cfg"] = "goca"
    foreground: Literal["released", "conditional"] = "released"
    variance_channels: bool = False
    every: Count = 1
    equal_mean: bool = False

    def __post_init__(self):
        if self.segmentor == "s-cfg" and self.foreground != "released":
            raise ValueError(
                'Expected `foreground` to be "released" beside `segmentor="s-cfg"`, which finds its own, but got '
                f"{self.foreground!r}."
            )
        if self.rate_min > self.rate_max:
            raise ValueError(
                f"Expected `rate_min` to be at most `rate_max`, but got {self.rate_min} and {self.rate_max}."
            )


@checked
@dataclass(frozen=True)
class Background:
    """The score that the classes of a segmentation must beat (method of the GoCA benchmarks).

    Args:
        entities: names of what is background, for all images, or a list of them for each image.
        merged: their maps are merged by the maximum before they are refined, as released; off refines each by itself, and the
            background is larger at one offset.
        threshold: a constant score, or the least one where there are entities too.
        offset: added to the highest score of the entities, unless there is a threshold.
    """

    entities: tuple[str, ...] | tuple[tuple[str, ...], ...] = ()
    threshold: float | None = None
    offset: float = 0.2
    merged: bool = True

    def __post_init__(self):
        named = any(isinstance(entity, str) or entity for entity in self.entities)
        if not named and self.threshold is None:
            raise ValueError("Expected a `threshold`, `entities`, or both for the background, but got neither.")

    @classmethod
    def of(cls, value: "float | Sequence[str] | Background") -> "Background":
        """A number is a constant threshold; names are background entities."""
        value = read("background", value, float | Sequence[str] | Background)
        if isinstance(value, Background):
            return value
        return cls(threshold=value) if isinstance(value, float | int) else cls(entities=tuple(value))


@checked
@dataclass(frozen=True)
class CRF:
    """Constants of a fully connected CRF (Krähenbühl and Koltun, NIPS 2011, equation 3), by the paper's symbols.

    Args:
        w1, theta_alpha, theta_beta: weight of the bilateral kernel; its standard deviation in pixels of a picture of 500 on
            the longer side, as Pascal VOC's are (of others in proportion), and in grey levels (0 to 255) of each colour.
        w2, theta_gamma: weight of the spatial kernel; its standard deviation in pixels.
        iterations: of mean-field.
    """

    w1: Annotated[float, at_least(0)] = 4.0
    theta_alpha: Positive = 67.0
    theta_beta: Positive = 3.0
    w2: Annotated[float, at_least(0)] = 3.0
    theta_gamma: Positive = 1.0
    iterations: Annotated[int, at_least(0)] = 10


@checked
@dataclass(frozen=True)
class LayerPreset:
    """Which layers of a denoiser GoCA reads (method, presets), by full module name.

    Args:
        text: layers with text keys, in network order.
        self_attention: for each of them the layer with pixel keys beside it; in joint attention it is the same one.
        reference: the layer of the dense features.
        refine: self-attention layers of the finest grid, which refine the maps.
        order: how often they do.
        timestep: of 1000, for the segmentation of real images.
        heads, row_normalise, agreement_rows, working_size: see `GoCAConfig`.
        features: what of the reference layer is dense features, heads side by side: "query" (before norm and rotary
            embeddings) or "output" (before the projection).
        manual: of the text layers those that are picked by hand in the papers; none where they pick none.
    """

    text: tuple[str, ...]
    self_attention: tuple[str, ...]
    reference: str
    refine: tuple[str, ...]
    order: Annotated[int, at_least(0)] = 2
    timestep: Annotated[int, at_least(0)] = 100
    heads: Weighing = "contribution"
    features: Literal["query", "output"] = "query"
    row_normalise: bool = False
    agreement_rows: Count | None = None
    working_size: Count | None = None
    manual: tuple[str, ...] = ()

    def reading(self, layers: str | Sequence[str]) -> "LayerPreset":
        """With the text layers alone that `GoCAConfig.layers` asks for, and the self-attention beside them."""
        if layers in ("agreement", "uniform"):
            return self
        names = self.manual if layers == "manual" else layers
        if not names:
            raise ValueError(
                "Expected a model whose layers the papers pick by hand (Stable Diffusion 1.x), but nobody did for this one: "
                "name them, as in layers=[\"mid_block\"], or use 'uniform'."
            )
        text, beside = layers_named(names, self.text), dict(zip(self.text, self.self_attention, strict=True))
        return replace(self, text=text, self_attention=tuple(beside[name] for name in text))

    @property
    def layers(self) -> frozenset[str]:
        """Every layer that may be read."""
        return frozenset((*self.text, *self.self_attention, *self.refine, self.reference))


def layers_named(names: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The known layers that some names stand for, in network order: a full name, or one that several begin with.

    ValueError, with the nearest ones, for a name that no layer has.
    """
    for name in names:
        if not any(_stands_for(name, layer) for layer in known):
            parts = {layer.rsplit(".", n)[0] for layer in known for n in range(layer.count(".") + 1)}
            near = get_close_matches(str(name), sorted(parts), 3, cutoff=0)
            raise ValueError(
                f"Expected names of this model's layers, but got {name!r}: the nearest are {', '.join(near)}."
            )
    return tuple(layer for layer in known if any(_stands_for(name, layer) for name in names))


def _stands_for(name, layer):
    return f"{layer}.".startswith(f"{name}.")
