"""One guided generation: hooks on the denoiser and the text encoders, regions at every step, and the rate they give."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from goca_guidance.config import GoCAConfig, SCFGConfig
from goca_guidance.denoisers.adapters import family_of
from goca_guidance.denoisers.layouts import named_layout, prompt_layout, token_layout
from goca_guidance.denoisers.readings import Asked
from goca_guidance.denoisers.words import Encoded, sentence
from goca_guidance.hooks.callers import OwnCalls
from goca_guidance.hooks.observer import check_seen
from goca_guidance.hooks.prompt_watch import PromptWatch, Told
from goca_guidance.hooks.steps import Steps
from goca_guidance.method.records import Regions, TokenLayout, WordMaps
from goca_guidance.method.scfg import SCFGSegmentor, rate_map
from goca_guidance.method.segmentor import GoCASegmentor, GuidingSegmentor
from goca_guidance.mixing import Mixing


LayoutRule = Callable[[Sequence[Encoded], str, bool], TokenLayout]  # encoded text, sink, drop_stop_words
SEGMENTORS: dict[str, tuple[type[GuidingSegmentor], LayoutRule]] = {  # by `SCFGConfig.segmentor`
    "goca": (GoCASegmentor, prompt_layout),
    "s-cfg": (SCFGSegmentor, token_layout),
}
PRODUCT = Mixing()
GuidanceRule = Callable[[Tensor, Regions, float, SCFGConfig], Tensor]
"""A guidance rule: guidance difference [b c H W], regions, scale, config to the rate [b 1 H W]."""


class GuidedCall(PromptWatch):
    """One guided generation: regions at every step, and the answer to the loop's question for the rate.

    A step, as `Watch` brings it, and what is held between (`Steps` counts, and tells predictions apart):

    1. `on_forward`, conditional prediction begun: it is decided whether the step is guided (`_guided`), and unless the last
       regions still serve, a segmentor is made. The product of scale and difference is now awaited.
    2. `on_attention`, until the prediction ends: the segmentor reads each record, and `negative` those of the negative prompt.
    3. Where predictions are `separate`, 1 and 2 again for the unconditional one.
    4. `rate`: the loop multiplies scale and difference. The segmentor answers with regions and is let go; `rule` gives the
       rate; nothing is awaited. A step that is not guided, or a product that is not the loop's, is answered by None.

    Where a step is predicted in parts (views of a panorama), each part is guided by regions of its own.
    `_regions_found` and `_words_found` stay until the next ones are found, for `_steps_served` steps (`SCFGConfig.every`).
    After the loop `check` says whether every prediction was multiplied, and whether all were finite.

    Where a loop makes no such product (`mixing.product`), 4 comes with the later prediction instead (`on_prediction`): it is
    replaced by one that the loop mixes to what guidance by regions would give.

    Args:
        denoisers: predict twice a step: two halves of one batch, or, if `separate`, the conditional prediction and then the
            unconditional one. Each predicts some of the steps, or one of the halves.
        text_encoders: with their tokenizers, in the order of the denoiser's text sequence.
        goca, scfg: the choices.
        rule: the guidance rule.
        images, prompts: how many; None, where predictions are `separate`, takes what denoiser and text encoder get.
        prompt_read: whether an encoder reads the prompt; with prompt embeddings it reads the negative prompt at most.
        separate: see `denoisers`; None is found out at the first step.
        mixing: how the loop mixes.
        scale: the guidance scale of the step in progress, where there is no product to tell it.
        is_guided: number of a step to whether regions guide it.
        own: whether a forward, or a product, is the loop's own, and not a callback's, a hook's or another pipeline's.
        asked: the prompts; None where only the encoders know them.
        region_tokens: regions named by the caller.
        keep_regions, keep_negative: what `results` returns: regions and guidance maps; the negative prompt's word maps.
    """

    def __init__(
        self,
        denoisers: torch.nn.Module | Sequence[torch.nn.Module],
        text_encoders: Sequence[tuple[Any, Any]],
        goca: GoCAConfig,
        scfg: SCFGConfig,
        *,
        rule: GuidanceRule = rate_map,
        images: int | None = None,
        prompts: int | None = None,
        prompt_read: bool = True,
        separate: bool | None = False,
        mixing: Mixing = PRODUCT,
        scale: Callable[[], float] = lambda: 1.0,
        is_guided: Callable[[int], bool] = lambda step: True,
        own: OwnCalls | Callable[[], bool] = lambda: True,
        asked: Asked | None = None,
        region_tokens: Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]] | None = None,
        keep_regions: bool = False,
        keep_negative: bool = False,
    ):
        several = denoisers if isinstance(denoisers, Sequence) else [denoisers]
        super().__init__([family_of(each) for each in several], text_encoders, asked, prompts, prompt_read)
        self.goca, self.scfg, self.rule = goca, scfg, rule
        self.mixing, self.scale = mixing, scale
        self.is_guided, self.own = is_guided, own
        self.region_tokens, self.keep_regions, self.keep_negative = region_tokens, keep_regions, keep_negative
        if region_tokens is None and not (prompt_read and self.text_encoders):
            raise ValueError(
                "Expected `region_tokens` beside `prompt_embeds`, because no tokens are seen: pass, for example, "
                '`region_tokens={"cat": [2], "grass": [5]}` (positions in the text sequence; `pipe.words(prompt)` finds '
                "them), or `use_scfg=False`."
            )
        self.steps = Steps(images, separate, self.family.branches, self.family.by_image)
        self.negative: GoCASegmentor | None = None  # reads the negative prompt's words in the unconditional prediction
        self._observed: Any = None  # the observer of the conditional prediction
        self._guided = False  # the step in progress is guided, by its own regions or the last ones
        self._images = 0  # of the step's difference
        self._conditional: Tensor | None = None  # prediction, where the unconditional one is to be replaced
        self._step_regions: Any = None  # of the step in progress
        self._regions_found: Any = None  # the last ones
        self._words_found: WordMaps | None = None  # of the negative prompt, the last ones
        self._steps_served = 0  # by them
        self._layouts: list[TokenLayout] = []  # the prompt's, then the negative prompt's
        self._regions: list[Regions] = []
        self._maps: list[Tensor] = []
        self._negative_maps: list[WordMaps] = []
        self._finite: list[Tensor] = []  # one flag a guided step, read after the loop: no synchronisation inside it

    @property
    def separate(self) -> bool:
        """Whether a step makes its predictions one after the other, as far as is known."""
        return bool(self.steps.separate)

    @property
    def step(self) -> int:
        """Steps begun."""
        return self.steps.count

    @property
    def branches(self) -> tuple[int, ...]:
        """Of the denoiser's call in progress: 0 unconditional, 1 conditional."""
        return self.steps.branches

    # ---- life of the call --------------------------------------------------------------------------------------------
    def check(self) -> None:
        """After the loop: guidance was really applied, to every prediction, and stayed finite."""
        if getattr(self.own, "stranger", ""):
            self._check_called()
        if self.steps.awaited and not (self.steps.separate and self.steps.products):
            raise RuntimeError(
                "Expected a product of guidance scale and guidance difference in the loop for each of its "
                f"{self.steps.predictions} predictions, but saw {self.steps.products or 'none'}."
            )
        if self._finite and not torch.stack(self._finite).all():
            first = torch.stack(self._finite).logical_not().nonzero()[0].item()
            raise ValueError(
                f"Expected finite predictions, but those of guided step {first} hold NaN or infinity: use float32 or "
                "bfloat16, or check the model and the latents."
            )

    def results(self) -> tuple[list[Regions], Tensor | None, list[WordMaps]]:
        """Regions of each guided step, guidance maps [steps b 1 H W], word maps of the negative prompt, on the CPU."""
        maps = torch.stack(self._maps).cpu() if self._maps else None
        words = [WordMaps(found.scores.cpu(), found.labels) for found in self._negative_maps]
        return [regions.to("cpu") for regions in self._regions], maps, words

    # ---- what the hooks bring ----------------------------------------------------------------------------------------
    def is_own(self) -> bool:
        return self.own()

    def on_forward(self, call, device) -> None:
        if not self.steps.count:
            self._check_processors()
        branches = self.steps.forward(call, self.timestep, self.text)
        if 1 in branches:
            self._images, self._observed = call.batch // len(branches), self.observer
            self.observer.seen.clear()
            self.segmentor = self.negative = None
            self._guided = self.is_guided(self.steps.count - 1)
            stale = self._steps_served >= self.scfg.every or self.steps.parts
            if self._guided and (self._regions_found is None or stale):
                self._make_segmentors(device)
        unread = branches == (0,) and not (self.negative or self._unconditional_sink)
        self.observer.paused = self.segmentor is None or not branches or unread

    def _check_processors(self) -> None:
        """Before the first prediction: other methods (SAG, Attend-and-Excite, PAG) watch or change attention too."""
        others = {type(module.processor) for module, processor in self.processors if not _alike(module, processor)}
        if others:
            raise ValueError(
                "Expected attention as the denoiser's own processors compute it, but this pipeline has put "
                f"{', '.join(sorted(cls.__name__ for cls in others))} in their place, for a method of its own: pass "
                "use_scfg=False."
            )

    def on_attention(self, record) -> None:
        self.segmentor.keep(record, self.branches)
        if self.negative is not None and 0 in self.branches:
            self.negative.keep(record.branch(0, self.branches))

    def forget(self) -> None:
        super().forget()
        self.negative = self._observed = None

    def begin_step(self) -> None:
        """The next call of the denoiser is the first one of a step (where a loop tells; `rate` says so too)."""
        self.segmentor, self._guided = None, False
        self.steps.begin()

    @property
    def _unconditional_sink(self) -> bool:
        return self.family.unconditional_sink and self.scfg.foreground == "released"

    def _make_segmentors(self, device):
        if not self._layouts:
            images, layouts = self.call.batch // len(self.branches) * self.frames, self._new_layouts()
            self._layouts = [layout.repeat(images // len(layout.labels)).to(device) for layout in layouts]
        make, _ = SEGMENTORS[self.scfg.segmentor]
        sink = {"unconditional_sink": self._unconditional_sink, "rescaled_sink": self.scfg.foreground == "conditional"}
        self.segmentor = make(self.goca, self.family.preset, self._layouts[0], **sink)
        self.observer.projected = self.segmentor.projected
        if self.keep_negative:
            self.negative = GoCASegmentor(self.goca, self.family.preset, self._layouts[1])
            self.observer.projected = self.segmentor.projected | self.negative.projected

    def _new_layouts(self):
        sink, drop = self.family.sink, self.goca.drop_stop_words
        encoded, negative = self._texts()
        if self.region_tokens is not None:
            prompts = self.prompts or (len(encoded[0].ids) if encoded else 1)
            yield named_layout(self.region_tokens, prompts, self.call.text, sink, encoded)
        else:
            _, layout_rule = SEGMENTORS[self.scfg.segmentor]
            yield layout_rule(encoded, sink, drop)
        if self.keep_negative:
            if not negative or not all(sentence(negative, image) for image in range(len(negative[0].ids))):
                raise ValueError(
                    "Expected a `negative_prompt` of at least one word for its word maps, but the text encoders read none: "
                    "write one, or leave `output_negative_maps` off."
                )
            yield prompt_layout(negative, None, drop)

    def _texts(self) -> Told:
        """What the encoders read of the prompt and of the negative prompt. Regions that the caller names need neither."""
        found = self.told()
        if found is None or (self.prompt_read and not found[0]):
            if self.region_tokens is not None and not self.keep_negative:
                return [], []
            texts = (
                ", ".join(f"{len(read.ids)} x {read.ids.shape[1]}" for reads in self.reads for read in reads) or "none"
            )
            raise ValueError(
                "Expected the text encoders to read the prompt and the negative prompt, but which of the texts that they read "
                f"({texts} tokens, for {self.call.text} of the denoiser) is which cannot be told: pass `region_tokens`, for "
                'example `{"cat": [2], "grass": [5]}` (positions in the text sequence), or `use_scfg=False`.'
            )
        return found

    # ---- what the loop asks ------------------------------------------------------------------------------------------
    def rate(self, delta: Tensor, scale: float) -> Tensor | None:
        """Factor of this step's guidance difference, or None where guidance is plain."""
        if not self.own():
            return None
        self._check_called()
        image = self.steps.product()
        guided = self._guided
        if not self.steps.awaited:
            self._guided = False
        if not guided:
            self.segmentor = None
            return None
        if self.family.by_image:
            return self._rate(delta[None], scale, image)[0]
        return self._rate(delta, scale)

    def _rate(self, delta: Tensor, scale: float, image: int | None = None) -> Tensor:
        """Of all images of the step, or of one. The effective scale, of c + s (c - u) it is s + 1, is what is rated."""
        effective = scale + self.mixing.excess
        with torch.autocast(delta.device.type, enabled=False):
            maps = self._maps_of(delta, 1 if image is not None else self._images)
            if not image:
                self._step_regions = self._find_regions()
            regions = self._step_regions if image is None else self._step_regions.of(image)
            predicted = maps if self.scfg.variance_channels else maps[:, : self.family.channels]
            rate = self.rule(predicted, regions, effective, self.scfg)
        self._finite.append(torch.isfinite(delta).all())
        if self.keep_regions:
            self._keep(regions, effective * rate, image)
        if self.mixing.excess and self.mixing.product:
            rate = 1 + (rate - 1) * (effective / scale)
        packed = self.family.pack(rate.expand_as(maps))
        others = delta.shape[1] - packed.shape[1]  # tokens of other pictures that are mixed too
        return F.pad(packed, (0, 0, 0, others), value=1) if others else packed

    def _keep(self, regions, maps, image):
        if image:
            self._maps[-1] = torch.cat([self._maps[-1], maps])
        else:
            if self._maps and self._maps[-1].shape[2:] != maps.shape[2:]:
                raise RuntimeError(
                    "Expected latents of one size in all steps, whose guidance maps are returned together, but this loop "
                    f"makes parts of several ({tuple(self._maps[-1].shape[2:])}, {tuple(maps.shape[2:])}): leave "
                    "`output_regions` off."
                )
            self._maps.append(maps)
            self._regions.append(regions if image is None else self._step_regions)

    def on_prediction(self, output: Any) -> Any:
        """Where the loop makes no product of scale and difference, the later prediction is replaced.

        With an effective scale S and a rate r, u' = u + S (1 - r) / (S - 1) (c - u) is mixed to u + S r (c - u).
        """
        if self.mixing.product or not self.steps.branches:
            return None
        found = prediction(output)
        if self.steps.branches == (1,):
            self._conditional = found
            return None
        if self.steps.branches == (0,):
            return self._replace(output, self._conditional, found, 0)
        parts = dict(zip(self.steps.branches, found.chunk(2), strict=True))
        return self._replace(output, parts[1], parts[0], self.steps.branches.index(0) * len(parts[0]))

    def _replace(self, output, c, u, start):
        """The output with another unconditional prediction, whose images begin at `start`."""
        scale, self._conditional = float(self.scale()), None
        c = c[:, -u.shape[1] :] if u.ndim == 3 else c  # tokens of the text may stand before (Ideogram 4)
        rate = self.rate(c - u, scale)
        if rate is None or scale + self.mixing.excess == 1:  # the loop hears nothing of u
            return None
        change = 1 + 1 / (scale + self.mixing.excess - 1)  # S / (S - 1)
        first = prediction(output).clone()
        first[start : start + len(u)] = u.float() + change * (1 - rate) * (c - u).float()
        return replaced(output, first)

    def _check_called(self) -> None:
        if not self.steps.count:
            stranger = getattr(self.own, "stranger", "")
            raise RuntimeError(
                "Expected the denoiser to be called by the pipeline's own loop, in the thread that watches it, but it was "
                f"called {f'by {stranger}' if stranger else 'in another one or not at all'}, so nothing would be guided by "
                "regions: call it in the pipeline's class, in that thread, or pass `use_scfg=False`."
            )

    def _maps_of(self, delta: Tensor, images: int) -> Tensor:
        """The difference as maps b c *S, or an error where it is not of the size that the denoiser predicted."""
        try:
            maps = self.family.unpack(delta, self.call)
        except RuntimeError:  # so many tokens are no such maps
            maps = None
        if maps is None or (len(maps), *maps.shape[2:]) != (images, *self.call.latent):
            raise RuntimeError(
                f"Expected a guidance difference of {images} images and {self.call.latent} latent pixels, as the denoiser "
                f"predicted it, but got one of shape {tuple(delta.shape)}: this loop puts parts together before it mixes. "
                "Pass use_scfg=False."
            )
        return maps

    def _find_regions(self) -> Regions:
        """Those of this step's attention, or, between recomputations, the last ones; word maps alike."""
        if self.segmentor is not None:
            check_seen(self.segmentor.layers, self._observed.seen)
            self._regions_found, self._steps_served = self._regions_of(self.segmentor), 0
            if self.negative is not None:
                words = WordMaps(self.negative.scores(), self.negative.layout.labels)
                self._words_found = words.of_videos(self.frames) if self.family.by_frame else words
        if self._words_found is not None:
            self._negative_maps.append(self._words_found)
        self.segmentor = self.negative = None
        self._steps_served += 1
        return self._regions_found

    def _regions_of(self, segmentor) -> Regions:
        if self.family.by_frame:
            return segmentor.regions(self.call.latent[1:]).of_videos(self.frames)
        return segmentor.regions(self.call.latent)


def prediction(output: Any) -> Tensor:
    """The first tensor of a denoiser's output, a tuple or an object of one field."""
    return output[0] if isinstance(output, tuple) else output.sample


def replaced(output: Any, first: Tensor) -> Any:
    """The output with another first tensor."""
    return (first, *output[1:]) if isinstance(output, tuple) else type(output)(sample=first)


def _alike(module, processor) -> bool:
    return type(module.processor) is type(processor)


def check_alone(components: Mapping, denoisers: Sequence[torch.nn.Module]) -> None:
    """Refuse a pipeline that may change its denoiser in the middle of a call to one that is not watched."""
    kinds = {type(denoiser) for denoiser in denoisers}
    known = [id(denoiser) for denoiser in denoisers]
    others = [name for name, part in components.items() if id(part) not in known and type(part) in kinds]
    if others:
        raise ValueError(
            f"Expected one {type(denoisers[0]).__name__} in the pipeline, but it has {', '.join(others)} besides the one that "
            "would be watched: pass use_scfg=False."
        )
