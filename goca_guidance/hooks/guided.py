"""One guided generation: hooks on the denoiser and the text encoders, regions at every step, and the rate they give."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from goca_guidance.config import GoCAConfig, SCFGConfig
from goca_guidance.denoisers.adapters import family_of
from goca_guidance.denoisers.layouts import named_layout, prompt_layout, token_layout
from goca_guidance.denoisers.words import sentence
from goca_guidance.hooks.observer import check_seen
from goca_guidance.hooks.watch import Watch
from goca_guidance.method.records import Regions, TokenLayout, WordMaps
from goca_guidance.method.scfg import SCFGSegmentor, rate_map
from goca_guidance.method.segmentor import GoCASegmentor


class GuidedCall(Watch):
    """Sees what a pipeline's loop does, and answers its question for the rate. Works inside `with call.installed():`.

    Args:
        denoiser: predicts twice a step: unconditional and conditional halves of one batch, or, if `separate`, the
            conditional prediction and then the unconditional one.
        readers: text encoders with their tokenizers, in the order of the denoiser's text sequence.
        goca, scfg: the choices.
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
        readers: Sequence[tuple[Any, Any]],
        goca: GoCAConfig,
        scfg: SCFGConfig,
        *,
        images: int | None = None,
        prompts: int | None = None,
        prompt_read: bool = True,
        separate: bool = False,
        is_guided: Callable[[int], bool] = lambda step: True,
        region_tokens: Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]] | None = None,
        keep_regions: bool = False,
        keep_negative: bool = False,
    ):
        super().__init__(family_of(denoiser), readers)
        self.goca, self.scfg, self.images, self.prompts = goca, scfg, images, prompts
        self.separate, self.prompt_read, self.is_guided = separate, prompt_read, is_guided
        self.region_tokens, self.keep_regions, self.keep_negative = region_tokens, keep_regions, keep_negative
        if region_tokens is None and not (prompt_read and self.readers):
            raise ValueError(
                "Expected `region_tokens` beside `prompt_embeds`, because no tokens are seen: pass, for example, "
                '`region_tokens={"cat": [2], "grass": [5]}` (positions in the text sequence; `pipe.words(prompt)` finds '
                "them), or `use_scfg=False`."
            )
        self.step = 0  # conditional predictions begun
        self._pending = False  # one of them waits for its product with the guidance scale
        self._mixed = False  # a product was seen at all
        self._guided = False  # the step in progress is guided, by its own regions or the last ones
        self._found: Any = None  # the last regions
        self._words: WordMaps | None = None  # the last word maps of the negative prompt
        self._age = 0  # for how many steps they served
        self.negative: GoCASegmentor | None = None
        self._layouts: list[TokenLayout] = []  # the prompt's, then the negative prompt's
        self._regions: list[Regions] = []
        self._maps: list[Tensor] = []
        self._negative_maps: list[WordMaps] = []
        self._finite: list[Tensor] = []  # one flag a guided step, read after the loop: no synchronisation inside it

    # ---- life of the call --------------------------------------------------------------------------------------------
    def check(self) -> None:
        """After the loop: guidance was really applied, and stayed finite."""
        if self.step and not self._mixed:
            raise RuntimeError(
                "Expected a product of guidance scale and guidance difference in the loop, but saw none."
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
    def open(self, call, device) -> None:
        self._branches = self._predicted()
        if 1 in self._branches:
            self.observer.seen.clear()
            self.segmentor = self.negative = None
            self._guided = self.is_guided(self.step)
            if self._guided and (self._found is None or self._age >= self.scfg.every):
                self._open_step(device)
            self.step, self._pending = self.step + 1, True
        unread = self._branches == (0,) and not (self.negative or self.family.unconditional_sink)
        self.observer.paused = self.segmentor is None or not self._branches or unread

    def keep(self, record) -> None:
        self.segmentor.keep(record, self._branches)
        if self.negative is not None and 0 in self._branches:
            self.negative.keep(record.branch(0, self._branches))

    def forget(self) -> None:
        super().forget()
        self.negative = None

    def begin_step(self) -> None:
        """The next call of the denoiser is the first one of a step (where a loop tells; `rate` says so too)."""
        self.segmentor, self._guided, self._pending = None, False, False

    def _predicted(self) -> tuple[int, ...]:
        """Which predictions this call of the denoiser makes: 0 unconditional, 1 conditional; none where nothing is mixed."""
        batch, images = self.call.batch, self.images or self.call.batch
        if self.separate and batch == images:
            return (0,) if self._pending else (1,)
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

    def _open_step(self, device):
        if not self._layouts:
            images, layouts = self.call.batch // len(self._branches), self._new_layouts()
            self._layouts = [layout.repeat(images // len(layout.labels)).to(device) for layout in layouts]
        preset, unconditional_sink = self.family.preset, self.family.unconditional_sink
        if self.scfg.segmentor == "s-cfg":
            self.segmentor = SCFGSegmentor(preset, self._layouts[0], unconditional_sink)
        else:
            self.segmentor = GoCASegmentor(self.goca, preset, self._layouts[0], unconditional_sink)
        self.observer.projected = self.segmentor.projected
        if self.keep_negative:
            self.negative = GoCASegmentor(self.goca, preset, self._layouts[1])
            self.observer.projected = self.segmentor.projected | self.negative.projected

    def _new_layouts(self):
        sink, drop = self.family.sink, self.goca.drop_stop_words
        encoded = self._prompt(0)
        if self.region_tokens is not None:
            prompts = self.prompts or (len(encoded[0].ids) if encoded else 1)
            yield named_layout(self.region_tokens, prompts, self.call.text, sink, encoded)
        elif self.scfg.segmentor == "s-cfg":
            yield token_layout(encoded, sink)
        else:
            yield prompt_layout(encoded, sink, drop)
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
        guided, pending = self._guided, self._pending
        self._guided, self._pending, self._mixed = False, False, True
        if not guided or not pending:  # or not the loop's own product
            self.segmentor = None
            return None
        with torch.autocast(delta.device.type, enabled=False):
            regions = self._find_regions()
            maps = self.family.unpack(delta, self.call)
            predicted = maps if self.scfg.variance_channels else maps[:, : self.family.denoiser.config.in_channels]
            rate = rate_map(predicted, regions, scale, self.scfg)
        self._finite.append(torch.isfinite(delta).all())
        if self.keep_regions:
            self._regions.append(regions)
            self._maps.append(scale * rate)
        return self.family.pack(rate.expand_as(maps))

    def _find_regions(self) -> Regions:
        """Those of this step's attention, or, between recomputations, the last ones; word maps alike."""
        if self.segmentor is not None:
            check_seen(self.segmentor.layers, self.observer.seen)
            self._found, self._age = self.segmentor.regions(self.call.latent), 0
            if self.negative is not None:
                self._words = WordMaps(self.negative.scores(), self.negative.layout.labels)
        if self._words is not None:
            self._negative_maps.append(self._words)
        self.segmentor = self.negative = None
        self._age += 1
        return self._found


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
