"""One guided generation: hooks on the denoiser and the text encoders, regions at every step, and the rate they give."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from goca_guidance.config import GoCAConfig, SCFGConfig
from goca_guidance.denoisers.adapters import family_of
from goca_guidance.denoisers.layouts import named_layout, prompt_layout, token_layout
from goca_guidance.denoisers.readings import Asked, told_apart
from goca_guidance.denoisers.words import Encoded, sentence
from goca_guidance.hooks.callers import OwnCalls
from goca_guidance.hooks.observer import check_seen
from goca_guidance.hooks.steps import Steps
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
        own: whether a forward, or a product, is the loop's own, and not a callback's, a hook's or another pipeline's.
        asked: the prompts; None where only the encoders know them.
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
        own: OwnCalls | Callable[[], bool] = lambda: True,
        asked: Asked | None = None,
        region_tokens: Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]] | None = None,
        keep_regions: bool = False,
        keep_negative: bool = False,
    ):
        super().__init__(family_of(denoiser), text_encoders)
        self.goca, self.scfg, self.rule, self.prompts = goca, scfg, rule, prompts
        self.prompt_read, self.is_guided = prompt_read, is_guided
        self.own, self.asked = own, asked
        self.region_tokens, self.keep_regions, self.keep_negative = region_tokens, keep_regions, keep_negative
        if region_tokens is None and not (prompt_read and self.text_encoders):
            raise ValueError(
                "Expected `region_tokens` beside `prompt_embeds`, because no tokens are seen: pass, for example, "
                '`region_tokens={"cat": [2], "grass": [5]}` (positions in the text sequence; `pipe.words(prompt)` finds '
                "them), or `use_scfg=False`."
            )
        self.steps = Steps(images, separate)
        self.negative: GoCASegmentor | None = None  # reads the negative prompt's words in the unconditional prediction
        self._guided = False  # the step in progress is guided, by its own regions or the last ones
        self._expected: tuple[int, ...] = ()  # size of the step's difference: images, then places
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
        """Whether a step makes its predictions one after the other."""
        return self.steps.separate

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
        if self.steps.awaited and not (self.separate and self.steps.products):
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
            self._expected = self.shape[0] // len(branches), *_places(self.shape)
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
        self.negative = None

    def begin_step(self) -> None:
        """The next call of the denoiser is the first one of a step (where a loop tells; `rate` says so too)."""
        self.segmentor, self._guided = None, False
        self.steps.begin()

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

    def _texts(self) -> tuple[list[Encoded], list[Encoded]]:
        """What the encoders read of the prompt and of the negative prompt. Regions that the caller names need neither."""
        asked, reads, whole = self.asked, self.reads, len(self.text_encoders) == len(self.family.encoders)
        if not self.prompt_read:
            asked = asked and Asked(asked.negatives, (), asked.trusted)
        tokenizers = [tokenizer for _, tokenizer in self.text_encoders]
        whole = whole or self.family.side_by_side
        length = self.call.text
        if self.separate and not self.prompt_read:  # the negative prompt's own forward is still to come
            length = sum(of_encoder[0].shape[1] for of_encoder in reads if of_encoder)
        found = told_apart(reads, tokenizers, length, whole, self.prompts, asked) if any(reads) else ([], [])
        if found is None or (self.prompt_read and not found[0]):
            if self.region_tokens is not None and not self.keep_negative:
                return [], []
            texts = ", ".join(f"{len(ids)} x {ids.shape[1]}" for of_encoder in reads for ids in of_encoder) or "none"
            raise ValueError(
                "Expected the text encoders to read the prompt and the negative prompt, but which of the texts that they read "
                f"({texts} tokens, for {self.call.text} of the denoiser) is which cannot be told: pass `region_tokens`, for "
                'example `{"cat": [2], "grass": [5]}` (positions in the text sequence), or `use_scfg=False`.'
            )
        return found if self.prompt_read else ([], found[0])

    # ---- what the loop asks ------------------------------------------------------------------------------------------
    def rate(self, delta: Tensor, scale: float) -> Tensor | None:
        """Factor of this step's guidance difference, or None where guidance is plain."""
        if not self.own():
            return None
        self._check_called()
        self.steps.product()
        guided, self._guided = self._guided, False
        if not guided:
            self.segmentor = None
            return None
        with torch.autocast(delta.device.type, enabled=False):
            self._check_size(delta)
            regions = self._find_regions()
            maps = self.family.unpack(delta, self.call)
            predicted = maps if self.scfg.variance_channels else maps[:, : self.family.denoiser.config.in_channels]
            rate = self.rule(predicted, regions, scale, self.scfg)
        self._finite.append(torch.isfinite(delta).all())
        if self.keep_regions:
            self._regions.append(regions)
            self._maps.append(scale * rate)
        return self.family.pack(rate.expand_as(maps))

    def _check_called(self) -> None:
        if not self.steps.count:
            stranger = getattr(self.own, "stranger", "")
            raise RuntimeError(
                "Expected the denoiser to be called by the pipeline's own loop, in the thread that watches it, but it was "
                f"called {f'by {stranger}' if stranger else 'in another one or not at all'}, so nothing would be guided by "
                "regions: call it in the pipeline's class, in that thread, or pass `use_scfg=False`."
            )

    def _check_size(self, delta: Tensor) -> None:
        if (len(delta), *_places(delta.shape)) != self._expected:
            raise RuntimeError(
                f"Expected a guidance difference of {self._expected} (images and places), as the denoiser predicted it, but "
                f"got {(len(delta), *_places(delta.shape))}: this loop puts parts together before it mixes. Pass "
                "use_scfg=False."
            )

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


def _places(shape: torch.Size) -> tuple[int, ...]:
    """Of a prediction b c H W, or packed b n c, without images and channels."""
    return tuple(shape[2:]) if len(shape) == 4 else tuple(shape[1:-1])


def _alike(module, processor) -> bool:
    return type(module.processor) is type(processor)


def check_alone(components: Mapping, denoiser: torch.nn.Module) -> None:
    """Refuse a pipeline that may change its denoiser in the middle of a call: one is watched."""
    others = [name for name, part in components.items() if part is not denoiser and type(part) is type(denoiser)]
    if others:
        raise ValueError(
            f"Expected one {type(denoiser).__name__} in the pipeline, but it has {', '.join(others)} besides the one that "
            "would be watched: pass use_scfg=False."
        )
