"""GoCA + S-CFG inside a stock diffusers pipeline: one call observed, its guidance scale made spatial, nothing copied."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from goca_guidance.baselines import SCFGSegmentor
from goca_guidance.config import GoCAConfig, SCFGConfig
from goca_guidance.families import family_of
from goca_guidance.goca import GoCASegmentor
from goca_guidance.observer import AttentionObserver, check_seen
from goca_guidance.records import Regions, Segmentation
from goca_guidance.scfg import SpatialGuidanceScale, rate_map
from goca_guidance.segment import segment
from goca_guidance.tokens import encoder_ids, named_layout, prompt_layout, token_layout


@dataclass
class GoCASCFGPipelineOutput(BaseOutput):
    """Output of a guided call: the stock fields, then ours.

    Args:
        images: as the stock pipeline returns them.
        nsfw_content_detected: as the stock pipeline returns it.
        regions: one [`Regions`] for each guided step, on the CPU, at the latent's size; None unless asked for.
        guidance_maps: float32 [steps b 1 H W], guidance scale times rate of each guided step; None unless asked for.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    nsfw_content_detected: list[bool] | None = None
    regions: list[Regions] | None = None
    guidance_maps: Tensor | None = None


class GoCASCFGMixin:
    """Adds GoCA regions and S-CFG to a pipeline whose loop reads `self.guidance_scale` and calls `self.unet` once a step."""

    _goca_call: "_GuidedCall | None" = None  # the call in progress; None outside one, and then everything is stock
    unet: Any

    @property
    def guidance_scale(self):
        """The scale of the call in progress, spatial while one is guided."""
        if self._goca_call is None:
            return self._guidance_scale
        return SpatialGuidanceScale(self._guidance_scale, self._goca_call.rate)

    @torch.no_grad()
    def __call__(
        self,
        *args,
        use_scfg: bool = True,
        goca: GoCAConfig | None = None,
        scfg: SCFGConfig | None = None,
        scfg_start: float = 0.0,
        scfg_stop: float = 1.0,
        region_tokens: Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]] | None = None,
        output_regions: bool = False,
        **kwargs,
    ):
        r"""
        Generate images; every argument of the stock pipeline, plus the ones below, keyword-only.

        Args:
            use_scfg (`bool`, *optional*, defaults to `True`):
                Off is the stock pipeline, bit for bit. So is a `guidance_scale` of at most 1, where nothing is guided.
            goca ([`GoCAConfig`], *optional*):
                How attention becomes regions; the token rule (`drop_stop_words`) is here.
            scfg ([`SCFGConfig`], *optional*):
                How regions become a guidance map; the limits of the rate (`rate_min`, `rate_max`) are here.
            scfg_start (`float`, *optional*, defaults to 0.0):
                Fraction of the steps after which regions guide; before, guidance is plain.
            scfg_stop (`float`, *optional*, defaults to 1.0):
                Fraction of the steps after which guidance is plain again.
            region_tokens (`dict[str, list[int]]` or a list of them, *optional*):
                Regions by name and token positions, for all prompts or for each. By default every word of the prompt is
                one. Needed with `prompt_embeds`, where no tokens are seen.
            output_regions (`bool`, *optional*, defaults to `False`):
                Return the regions and guidance maps of every guided step.

        Returns:
            [`GoCASCFGPipelineOutput`], or with `return_dict=False` the stock tuple, followed by `(regions,
            guidance_maps)` where `output_regions`.
        """
        stock = super().__call__
        call = inspect.signature(stock).bind(*args, **kwargs)
        call.apply_defaults()
        if not 0 <= scfg_start <= scfg_stop <= 1:
            raise ValueError(f"Expected 0 <= `scfg_start` <= `scfg_stop` <= 1, but got {scfg_start} and {scfg_stop}.")
        guided = use_scfg and call.arguments["guidance_scale"] > 1 and self.unet.config.time_cond_proj_dim is None
        state = None
        if guided:
            self._check_guided(call.arguments, region_tokens)
            configs = _config(goca, GoCAConfig, "goca"), _config(scfg, SCFGConfig, "scfg")
            prompts = _prompt_count(call.arguments)
            state = _GuidedCall(self, *configs, (scfg_start, scfg_stop), prompts, region_tokens, output_regions)
        with nullcontext() if state is None else state.installed():
            output = stock(**{**_flat(call.arguments), "return_dict": True})
        if state is not None:
            state.check()
        return _output(output, state, call.arguments["return_dict"], output_regions)

    def _check_guided(self, arguments, region_tokens) -> None:
        prompt, latents = arguments["prompt"], arguments.get("latents")
        if prompt is None and arguments.get("prompt_embeds") is None:
            raise ValueError("Expected `prompt` or `prompt_embeds`, but got neither.")
        if prompt is None and region_tokens is None:
            raise ValueError(
                "Expected `region_tokens` beside `prompt_embeds`, because no tokens are seen: pass, for example, "
                '`region_tokens={"cat": [2], "grass": [5]}` (positions in the text sequence), or `use_scfg=False`.'
            )
        if latents is not None and not torch.isfinite(latents).all():
            raise ValueError("Expected finite `latents`, but got NaN or infinity among them.")

    def segment(self, images, classes: Sequence[str], **kwargs) -> Segmentation:
        """Segment real images by class names; see [`goca_guidance.segment.segment`] for the arguments."""
        return segment(self, super().__call__, images, classes, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        r"""
        A pipeline that shares every module of `pipeline` and leaves its dtype and device alone.

        Args:
            pipeline: a loaded pipeline of the same family.
            kwargs: components or settings that replace the ones of `pipeline`; `dtype` converts the shared modules.
        """
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        family = next(base for base in cls.__mro__ if base.__module__.startswith("diffusers.pipelines"))
        parameters = inspect.signature(family.__init__).parameters
        settings = {name: value for name, value in pipeline.config.items() if name in parameters}
        arguments = {**settings, **{n: c for n, c in pipeline.components.items() if n in parameters}, **kwargs}
        needed = {name for name, p in parameters.items() if p.default is p.empty and name != "self"}
        if missing := sorted(needed - set(arguments)):
            raise ValueError(
                f"Expected a pipeline with the components of {family.__name__}, but {type(pipeline).__name__} has no "
                f"{', '.join(missing)}. Use a pipeline of that family."
            )
        ours = cls(**arguments)
        return ours if dtype is None else ours.to(dtype=dtype)


class GoCASCFGPipeline(GoCASCFGMixin, StableDiffusionPipeline):
    r"""
    Stable Diffusion 1.x / 2.x with S-CFG guided by GoCA regions at every denoising step.

    Use it as [`~diffusers.StableDiffusionPipeline`]: load with `from_pretrained` (a hub repository or a folder;
    `goca_guidance.TINY_SD` is the embedded model), or share a loaded pipeline's modules with `from_pipe`. Papers: GoCA
    (arXiv 2603.06178), S-CFG (arXiv 2404.05384).
    """


def _signature():
    """The stock arguments, then ours: what help() and tools show."""
    stock = inspect.signature(StableDiffusionPipeline.__call__)
    ours = [p for p in inspect.signature(GoCASCFGMixin.__call__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    *named, extra = stock.parameters.values()
    return stock.replace(parameters=[*named, *ours, extra])


GoCASCFGMixin.__call__.__signature__ = _signature()  # type: ignore[attr-defined]


def _config(value, cls, name):
    if value is not None and not isinstance(value, cls):
        raise TypeError(f"Expected `{name}` to be a {cls.__name__} or None, but got {value!r}.")
    return value or cls()


def _prompt_count(arguments) -> int:
    prompt, embeds = arguments["prompt"], arguments.get("prompt_embeds")
    return 1 if isinstance(prompt, str) else len(embeds if prompt is None else prompt)


def _flat(arguments):
    """Bound arguments as keywords, the `**kwargs` of the stock signature spread."""
    return {**{k: v for k, v in arguments.items() if k != "kwargs"}, **arguments.get("kwargs", {})}


def _output(stock, state, return_dict, output_regions):
    ours = (([], None) if state is None else state.results()) if output_regions else ()
    if not return_dict:
        return (stock.images, stock.nsfw_content_detected, *ours)
    return GoCASCFGPipelineOutput(stock.images, stock.nsfw_content_detected, *ours)


class _GuidedCall:
    """State of one pipeline call: opens each step's observation, and answers the loop's question for the rate."""

    def __init__(self, pipe, goca, scfg, span, prompts, region_tokens, keep_regions):
        self.pipe, self.goca, self.scfg, self.span = pipe, goca, scfg, span
        self.prompts, self.region_tokens, self.keep_regions = prompts, region_tokens, keep_regions
        self.family = family_of(pipe.unet)
        self.step, self.segmentor, self.latent, self.ids, self.layout = 0, None, None, None, None
        self.regions: list[Regions] = []
        self.maps: list[Tensor] = []
        self.finite: list[Tensor] = []  # one flag a guided step, read after the loop: no synchronisation inside it

    # ---- life of the call --------------------------------------------------------------------------------------------
    @contextmanager
    def installed(self):
        """Hooks on the denoiser and the text encoder, and the spatial scale; all gone afterwards, whatever happens."""
        modules, preset = self.family.attention_modules, self.family.preset
        read = {name: module for name, module in modules.items() if name in preset.layers}
        self.observer = AttentionObserver(read, self._keep, self._grid, projected=frozenset(preset.cross))
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            hooked = {self.family.denoiser: self._before_denoiser, self.pipe.text_encoder: self._before_text_encoder}
            for module, hook in hooked.items():
                if module is not None:  # prompt embeddings need no text encoder
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.enter_context(self.observer)
            stack.callback(setattr, self.pipe, "_goca_call", None)
            self.pipe._goca_call = self
            yield

    def check(self) -> None:
        """After the call: guidance was really applied, and stayed finite."""
        if self.step == 0 and not self.pipe.interrupt:
            raise RuntimeError(
                f"{type(self.pipe).__name__} never multiplied its guidance difference by the guidance scale."
            )
        if self.finite and not torch.stack(self.finite).all():
            first = torch.stack(self.finite).logical_not().nonzero()[0].item()
            raise ValueError(
                f"Expected finite predictions, but those of guided step {first} hold NaN or infinity: use float32 or "
                "bfloat16, or check the model and the latents."
            )

    def results(self) -> tuple[list[Regions], Tensor | None]:
        """Regions of each guided step, and guidance maps [steps b 1 H W], on the CPU."""
        return [regions.to("cpu") for regions in self.regions], torch.stack(self.maps).cpu() if self.maps else None

    # ---- what the hooks bring ----------------------------------------------------------------------------------------
    def _before_text_encoder(self, module, args, kwargs):
        if self.ids is None:  # the prompt comes first, the negative prompt after it
            self.ids = encoder_ids(args, kwargs)

    def _before_denoiser(self, module, args, kwargs):
        sample = args[0] if args else kwargs["sample"]
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
        self.latent = tuple(sample.shape[-2:])
        fraction = self.step / max(1, self.pipe.num_timesteps)
        active = self.pipe.do_classifier_free_guidance and self.span[0] <= fraction < self.span[1]
        self.observer.paused = not active
        self.observer.seen.clear()
        if active and self.layout is None:
            self.layout = self._layout(sample.shape[0] // 2, text.shape[1]).to(sample.device)
        self.segmentor = self._new_segmentor() if active else None

    def _layout(self, batch, length):
        sink = self.family.sink_token
        if self.region_tokens is not None:
            layout = named_layout(self.region_tokens, self.prompts, length, sink)
        elif self.scfg.segmentor == "s-cfg":
            layout = token_layout(self.pipe.tokenizer, self.ids)
        else:
            layout = prompt_layout(self.pipe.tokenizer, self.ids, self.goca.drop_stop_words, sink)
        return layout.repeat(batch // len(layout.labels))

    def _new_segmentor(self):
        preset = self.family.preset
        if self.scfg.segmentor == "s-cfg":
            return SCFGSegmentor(preset, self.layout, self.family.sink_token)
        return GoCASegmentor(self.goca, preset, self.layout, guided=True, sink=self.family.sink_token)

    def _grid(self, pixels):
        return self.family.grid(pixels, self.latent)

    def _keep(self, record):
        if record.name in self.segmentor.layers:
            self.segmentor.keep(record)

    # ---- what the loop asks ------------------------------------------------------------------------------------------
    def rate(self, delta: Tensor, scale: float) -> Tensor | None:
        """Rate map of this step, or None where guidance is plain."""
        self.step += 1
        segmentor, self.segmentor = self.segmentor, None
        if segmentor is None:
            return None
        check_seen(segmentor.layers, self.observer.seen)
        with torch.autocast(delta.device.type, enabled=False):
            regions = segmentor.regions(tuple(delta.shape[-2:]))
            rate = rate_map(delta, regions, scale, self.scfg)
        self.finite.append(torch.isfinite(delta).all())
        if self.keep_regions:
            self.regions.append(regions)
            self.maps.append(scale * rate)
        return rate
