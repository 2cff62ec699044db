"""One guided generation: hooks on the denoiser and the text encoders, regions at every step, and the rate they give."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from goca_guidance.config import GoCAConfig, SCFGConfig
from goca_guidance.denoisers.adapters import family_of
from goca_guidance.denoisers.layouts import named_layout, prompt_layout, token_layout
from goca_guidance.denoisers.words import Encoded, sentence
from goca_guidance.hooks.observer import check_seen
from goca_guidance.hooks.watch import Watch
from goca_guidance.method.records import Regions, TokenLayout, WordMaps
from goca_guidance.method.scfg import SCFGSegmentor, rate_map
from goca_guidance.method.segmentor import GoCASegmentor, GuidingSegmentor


LayoutRule = Callable[[Sequence[Encoded], str, bool], TokenLayout]  # encoded text, sink, drop_stop_words
SEGMENTORS: dict[str, tuple[type[GuidingSegmentor], LayoutRule]] = {  # by `SCFGConfig.segmentor`
    "goca": (GoCASegmentor, prompt_layout),
    "s-cfg": (SCFGSegmentor, token_layout),
}
GuidanceRule = Callable[[Tensor, Regions, float, SCFGConfig], Tensor]
"""A guidance rule: guidance difference [b c H W], regions, scale, config to the rate [b 1 H W]."""


class GuidedCall(Watch):
    """One guided generation: regions at every step, and the answer to the loop's question for the rate.

    A step, as `Watch` brings it, and what is held between:

    1. `on_forward`, conditional prediction begun: it is decided whether the step is guided (`_guided`), and unless the last
       regions still serve, a segmentor is made. The product of scale and difference is now awaited (`_awaited`).
    2. `on_attention`, until the prediction ends: the segmentor reads each record, and `negative` those of the negative prompt.
    3. Where predictions are `separate`, 1 and 2 again for the unconditional one, known by `_awaited`.
    4. `rate`: the loop multiplies scale and difference. The segmentor answers with regions and is let go; `rule` gives the
       rate; nothing is awaited. A step that is not guided, or a product that is not the loop's, is answered by None.

    `_regions_found` and `_words_found` stay until the next ones are found, for `_steps_served` steps (`SCFGConfig.every`).
    After the loop `check` says whether a product was seen at all, and whether all were finite.

    Args:
        denoiser: predicts twice a step: unconditional and conditional halves of one batch, or, if `separate`, the
            conditional prediction and then the unconditional one.
        text_encoders: with their tokenizers, in the order of the denoiser's text sequence.
        goca, scfg: the choices.
        rule: the guidance rule.
        images, prompts: how many; None, where predictions are `separate`, takes what denoiser and text encoder get.
        prompt_read: whether an encoder reads the prompt; with prompt embeddings it reads the negative prompt at most.
        separate: see `denoiser`.
        is_guided: number of a step to whether regions guide it.
        region_tokens: regions named by the caller.
        keep_regions, keep_negative: what `results` returns: regions and guidance maps; the negative prompt's word maps.
    """

    def __init__(
        self,
        denoiser: torch.nn.Module,
        text_encoders: Sequence[tuple[Any, Any]],
        goca: GoCAConfig,
        scfg: SCFGConfig,
        *,
        rule: GuidanceRule = rate_map,
        images: int | None = None,
        prompts: int | None = None,
        prompt_read: bool = True,
        separate: bool = False,
        is_guided: Callable[[int], bool] = lambda step: True,
        region_tokens: Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]] | None = None,
        keep_regions: bool = False,
        keep_negative: bool = False,
    ):
        super().__init__(family_of(denoiser), text_encoders)
        self.goca, self.scfg, self.rule, self.images, self.prompts = goca, scfg, rule, images, prompts
        self.separate, self.prompt_read, self.is_guided = separate, prompt_read, is_guided
        self.region_tokens, self.keep_regions, self.keep_negative = region_tokens, keep_regions, keep_negative
        if region_tokens is None and not (prompt_read and self.text_encoders):
            raise ValueError(
                "Expected `region_tokens` beside `prompt_embeds`, because no tokens are seen: pass, for example, "
                '`region_tokens={"cat": [2], "grass": [5]}` (positions in the text sequence; `pipe.words(prompt)` finds '
                "them), or `use_scfg=False`."
            )
        self.step = 0  # conditional predictions begun
        self.branches: tuple[int, ...] = ()  # of the denoiser's call in progress: 0 unconditional, 1 conditional
        self.negative: GoCASegmentor | None = None  # reads the negative prompt's words in the unconditional prediction
        self._guided = False  # the step in progress is guided, by its own regions or the last ones
        self._awaited = False  # the step's product of scale and difference is still to come
        self._product_seen = False  # in any step
        self._regions_found: Any = None  # the last ones
        self._words_found: WordMaps | None = None  # of the negative prompt, the last ones
        self._steps_served = 0  # by them
        self._layouts: list[TokenLayout] = []  # the prompt's, then the negative prompt's
        self._regions: list[Regions] = []
        self._maps: list[Tensor] = []
        self._negative_maps: list[WordMaps] = []
        self._finite: list[Tensor] = []  # one flag a guided step, read after the loop: no synchronisation inside it

    # ---- life of the call --------------------------------------------------------------------------------------------
    def check(self) -> None:
        """After the loop: guidance was really applied, and stayed finite."""
        if self.step and not self._product_seen:
            raise RuntimeError(
                "Expected a product of guidance scale and guidance difference in the loop, but saw none."
            )
        if self._product_seen and not self.step:
            raise RuntimeError(
                "Expected the denoiser to be called in the thread that watches it, but it was called in another one or not at "
                "all, so nothing was guided by regions: call the pipeline in that thread, or pass `use_scfg=False`."
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
    def on_forward(self, call, device) -> None:
        self.branches = self._predicted()
        if 1 in self.branches:
            self.observer.seen.clear()
            self.segmentor = self.negative = None
            self._guided = self.is_guided(self.step)
            if self._guided and (self._regions_found is None or self._steps_served >= self.scfg.every):
                self._make_segmentors(device)
            self.step, self._awaited = self.step + 1, True
        unread = self.branches == (0,) and not (self.negative or self._unconditional_sink)
        self.observer.paused = self.segmentor is None or not self.branches or unread

    def on_attention(self, record) -> None:
        self.segmentor.keep(record, self.branches)
        if self.negative is not None and 0 in self.branches:
            self.negative.keep(record.branch(0, self.branches))

    def forget(self) -> None:
        super().forget()
        self.negative = None

    def begin_step(self) -> None:
        """The next call of the denoiser is the first one of a step (where a loop tells; `rate` says so too)."""
        self.segmentor, self._guided, self._awaited = None, False, False

    def _predicted(self) -> tuple[int, ...]:
        """Which predictions this call of the denoiser makes: 0 unconditional, 1 conditional; none where nothing is mixed."""
        batch, images = self.call.batch, self.images or self.call.batch
        if self.separate and batch == images:
            return (0,) if self._awaited else (1,)
        if not self.separate and batch in (images, 2 * images):
            if batch == images and self.step == 0:
                raise ValueError(
                    f"Expected two predictions of {images} images in one batch, but the denoiser got one of them: this "
                    "pipeline's guidance is distilled, or its predictions come one by one. Pass use_scfg=False."
                )
            return (0, 1) if batch == 2 * images else ()
        raise ValueError(
            f"Expected unconditional and conditional predictions of {images} images, but the denoiser got a batch of {batch}. "
            "Pipelines that mix three predictions (PAG, InstructPix2Pix) are not supported: pass use_scfg=False."
        )

    @property
    def _unconditional_sink(self) -> bool:
        return self.family.unconditional_sink and self.scfg.foreground == "released"

    def _make_segmentors(self, device):
        if not self._layouts:
            images, layouts = self.call.batch // len(self.branches), self._new_layouts()
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
        encoded = self._prompt(0)
        if self.region_tokens is not None:
            prompts = self.prompts or (len(encoded[0].ids) if encoded else 1)
            yield named_layout(self.region_tokens, prompts, self.call.text, sink, encoded)
        else:
            _, layout_rule = SEGMENTORS[self.scfg.segmentor]
            yield layout_rule(encoded, sink, drop)
        if self.keep_negative:
            negative = self._prompt(1)
            if not negative or not all(sentence(negative, image) for image in range(len(negative[0].ids))):
                raise ValueError(
                    "Expected a `negative_prompt` of at least one word for its word maps, but the text encoders read none: "
                    "write one, or leave `output_negative_maps` off."
                )
            yield prompt_layout(negative, None, drop)

    def _prompt(self, which):
        """What the encoders read: the prompt (0), which comes first, or the negative prompt (1)."""
        return self.encoded(which - (not self.prompt_read))

    # ---- what the loop asks ------------------------------------------------------------------------------------------
    def rate(self, delta: Tensor, scale: float) -> Tensor | None:
        """Factor of this step's guidance difference, or None where guidance is plain."""
        guided, awaited = self._guided, self._awaited
        self._guided, self._awaited, self._product_seen = False, False, True
        if not guided or not awaited:  # or not the loop's own product
            self.segmentor = None
            return None
        with torch.autocast(delta.device.type, enabled=False):
            regions = self._find_regions()
            maps = self.family.unpack(delta, self.call)
            predicted = maps if self.scfg.variance_channels else maps[:, : self.family.denoiser.config.in_channels]
            rate = self.rule(predicted, regions, scale, self.scfg)
        self._finite.append(torch.isfinite(delta).all())
        if self.keep_regions:
            self._regions.append(regions)
            self._maps.append(scale * rate)
        return self.family.pack(rate.expand_as(maps))

    def _find_regions(self) -> Regions:
        """Those of this step's attention, or, between recomputations, the last ones; word maps alike."""
        if self.segmentor is not None:
            check_seen(self.segmentor.layers, self.observer.seen)
            self._regions_found, self._steps_served = self.segmentor.regions(self.call.latent), 0
            if self.negative is not None:
                self._words_found = WordMaps(self.negative.scores(), self.negative.layout.labels)
        if self._words_found is not None:
            self._negative_maps.append(self._words_found)
        self.segmentor = self.negative = None
        self._steps_served += 1
        return self._regions_found


def check_input(arguments: Mapping) -> None:
    """Refuse what a stock pipeline would only stumble over later."""
    if arguments["prompt"] is None and arguments.get("prompt_embeds") is None:
        raise ValueError("Expected `prompt` or `prompt_embeds`, but got neither.")
    if arguments.get("pag_scale"):  # refused before the loop, which would leave its processors behind
        raise ValueError(
            "Expected two predictions to mix, but perturbed-attention guidance makes a third: pass `pag_scale=0.0`, or "
            "`use_scfg=False`."
        )
    latents = arguments.get("latents")
    if latents is not None and not torch.isfinite(latents).all():
        raise ValueError("Expected finite `latents`, but got NaN or infinity among them.")


def config_of(value, cls: type, name: str):
    """A configuration, the default one for None."""
    if value is not None and not isinstance(value, cls):
        raise TypeError(f"Expected `{name}` to be a {cls.__name__} or None, but got {value!r}.")
    return value or cls()
