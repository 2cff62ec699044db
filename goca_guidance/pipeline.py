"""GoCA + S-CFG inside stock diffusers pipelines: one call observed, its guidance scale made spatial, no loop copied."""

import dataclasses
import functools
import inspect
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from os import PathLike
from types import MethodType
from typing import Annotated, Any, get_type_hints

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines import pipeline_utils
from diffusers.utils import BaseOutput
from torch import Tensor

from goca_guidance.arguments import bind, check_arguments, check_latents, counts, documented, or_plain
from goca_guidance.config import CRF, Background, GoCAConfig, SCFGConfig
from goca_guidance.denoisers.adapters import denoiser_of, denoisers_of, family_of, text_encoders_of
from goca_guidance.denoisers.layouts import named_words
from goca_guidance.denoisers.readings import Asked, forms_of
from goca_guidance.denoisers.words import bare, has_marks, tokenise
from goca_guidance.hooks.callers import OwnCalls
from goca_guidance.hooks.finite import finite_pictures
from goca_guidance.hooks.guided import GuidanceRule, GuidedCall, check_alone
from goca_guidance.method.records import Regions, WordMaps
from goca_guidance.method.scfg import SpatialGuidanceScale, rate_map
from goca_guidance.method.segmentor import GoCASegmentor, ScoringSegmentor
from goca_guidance.mixing import FURTHER, mixing_of, scales_of, unserved
from goca_guidance.real_images.discover import discover
from goca_guidance.real_images.forwards import check_further
from goca_guidance.real_images.prompt_reading import Reading
from goca_guidance.real_images.segment import Segmentation, segment
from goca_guidance.schema import between, check_names, checked, shown
from goca_guidance.stock import (
    PREFIX,
    check_folder,
    is_text_to_image,
    join_auto_pipelines,
    named_pipeline,
    single_file_class,
    stock_class,
)


_CALLS: dict[tuple[int, int], GuidedCall] = {}  # in progress, by pipeline and thread: a copy of a pipeline is in none


@dataclasses.dataclass
class GoCASCFGPipelineOutput(BaseOutput):
    """Output of a guided call: the stock fields, then ours, which are None unless asked for.

    Args:
        images: as the stock pipeline returns them.
        nsfw_content_detected: as the stock pipeline returns it, where it does.
        regions: one [`Regions`] for each guided step, on the CPU, at the latent's size.
        guidance_maps: float32 [steps b 1 H W], guidance scale times rate of each guided step.
        negative_maps: one [`WordMaps`] for each guided step: where the words of the negative prompt act.
    """

    images: list[Any] | np.ndarray | Tensor
    nsfw_content_detected: list[bool] | None = None
    regions: list[Regions] | None = None
    guidance_maps: Tensor | None = None
    negative_maps: list[WordMaps] | None = None


class GoCASCFGPipeline(DiffusionPipeline):
    r"""
    Any stock text-to-image pipeline that mixes two predictions, with S-CFG guided by GoCA regions at every denoising step.

    [`~GoCASCFGPipeline.from_pretrained`] (a hub repository or a folder; `goca_guidance.TINY_SD` is the embedded model) and
    [`~GoCASCFGPipeline.from_pipe`] (a loaded pipeline, whose modules are shared) give a subclass of both this class and the
    stock one, image-to-image, inpainting and ControlNet pipelines included. Denoisers: those of Stable Diffusion 1.x, 2.x,
    XL and 3, PixArt-alpha and -Sigma, Flux.1, HunyuanDiT; others with cross-attention get a generic preset and a warning.
    Papers: GoCA (arXiv 2603.06178), S-CFG (arXiv 2404.05384).

    How the classes are made: `guided` derives one from this class and a stock one, the same at every call; `__init_subclass__`
    gives it a `__call__` that shows the stock arguments and ours; `__new__` makes `GoCASCFGPipeline(**components)` one of
    them; and the module's `__getattr__` finds them by name, for pickle. This class alone is never instantiated.

    `guidance_rule` may be set, on a class or on a pipeline: from difference and regions to the rate (docs/how_to_add.md).
    """

    guidance_rule: GuidanceRule = staticmethod(rate_map)

    def __new__(cls, *args, **components):
        """`GoCASCFGPipeline(**components)` is the family's text-to-image pipeline."""
        if cls is GoCASCFGPipeline:
            cls = guided(named_pipeline(family_of(denoiser_of(components))))
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs):
        """Give the subclass's `__call__` the stock arguments and ours to show: in help() and to tools."""
        super().__init_subclass__(**kwargs)
        stock, ours = inspect.signature(stock_of(cls).__call__), inspect.signature(GoCASCFGPipeline.__call__)

        @torch.no_grad()
        @functools.wraps(GoCASCFGPipeline.__call__)
        def __call__(self, *args, **kwargs):  # noqa: N807
            return inspect.unwrap(GoCASCFGPipeline.__call__)(self, *args, **kwargs)

        last = [p for p in stock.parameters.values() if p.kind is p.VAR_KEYWORD]
        added = [p for p in ours.parameters.values() if p.kind is p.KEYWORD_ONLY]
        first = [p for p in stock.parameters.values() if p.kind is not p.VAR_KEYWORD]
        hints = get_type_hints(GoCASCFGPipeline.__call__)  # without the bounds, which tell a reader nothing
        added = [p.replace(annotation=hints[p.name]) for p in added]
        __call__.__signature__ = stock.replace(parameters=[*first, *added, *last])
        __call__.__doc__ = documented(GoCASCFGPipeline.__call__.__doc__, stock_of(cls).__call__.__doc__)
        if "__call__" not in vars(cls):  # a subclass may have its own
            cls.__call__ = __call__

    @property
    def _goca_call(self) -> GuidedCall | None:
        """The call in progress; None outside one, and then everything is stock."""
        return _CALLS.get((id(self), threading.get_ident()))

    @property
    def guidance_scale(self):
        """The scale of the call in progress, spatial while one is guided by it (true guidance has one of another name)."""
        call, scale = self._goca_call, self._guidance_scale
        if call is None or not call.mixing.product or call.mixing.scale != "guidance_scale":
            return float(scale) if isinstance(scale, SpatialGuidanceScale) else scale  # copied in the middle of a call
        return SpatialGuidanceScale(scale, call.rate)

    @torch.no_grad()
    @checked
    def __call__(
        self,
        *args,
        use_scfg: bool = True,
        goca: GoCAConfig | None = None,
        scfg: SCFGConfig | None = None,
        scfg_start: Annotated[float, between(0, 1)] = 0.0,
        scfg_stop: Annotated[float, between(0, 1)] = 1.0,
        region_tokens: Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]] | None = None,
        output_regions: bool = False,
        output_negative_maps: bool = False,
        **kwargs,
    ):
        r"""
        Generate images; every argument of the stock pipeline, plus the ones below, keyword-only.

        Args:
            use_scfg (`bool`, *optional*, defaults to `True`):
                Off is the stock pipeline, bit for bit. So is a `guidance_scale` of at most 1, where nothing is guided
                (Flux: a `true_cfg_scale` of at most 1 that you pass yourself).
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
                one. Needed with `prompt_embeds`, where no tokens are seen; [`~GoCASCFGPipeline.words`] finds positions.
            output_regions (`bool`, *optional*, defaults to `False`):
                Return the regions and guidance maps of every guided step.
            output_negative_maps (`bool`, *optional*, defaults to `False`):
                Return where the words of the negative prompt act at every guided step.

        Returns:
            [`GoCASCFGPipelineOutput`], or with `return_dict=False` the stock tuple, followed by `(regions,
            guidance_maps)` where `output_regions` and by `negative_maps` where `output_negative_maps`.
        """
        stock = super().__call__
        arguments, given = bind(stock, stock_of(type(self)).__name__, _our_arguments(), args, kwargs)
        if scfg_start > scfg_stop:
            raise ValueError(f"Expected `scfg_start` to be at most `scfg_stop`, but got {scfg_start} and {scfg_stop}.")
        if use_scfg:
            check_arguments(arguments, given)
        state = None
        if use_scfg and self._is_guided(arguments, given):
            self._check_latents(arguments)
            with or_plain():
                state = self._guided_call(
                    arguments,
                    goca or GoCAConfig(),
                    scfg or SCFGConfig(),
                    is_guided=self._window(scfg_start, scfg_stop),
                    region_tokens=region_tokens,
                    keep_regions=output_regions,
                    keep_negative=output_negative_maps,
                )
        if torch.is_grad_enabled():  # called by `__wrapped__`, as one calls a stock pipeline for gradients
            if state is not None:
                raise ValueError(
                    "Expected no gradients to be asked for, because regions have none, but this call of a guided pipeline is "
                    "not under `torch.no_grad()`: pass `use_scfg=False`, or call the pipeline itself."
                )
            stock = MethodType(inspect.unwrap(stock.__func__), self)
        output = self._run(stock, arguments, state)
        return _output(output, state, arguments.get("return_dict", True), output_regions, output_negative_maps)

    def _is_guided(self, arguments, given) -> bool:
        mixing = mixing_of(stock_of(type(self)))
        scale = max(scales_of(mixing, arguments))
        embedded = hasattr(self, "get_guidance_scale_embedding")  # the denoiser takes it: a latent consistency model
        config = family_of(denoiser_of(self.components)).denoiser.config
        if embedded and getattr(config, "time_cond_proj_dim", None) is not None:
            return False  # nothing is mixed
        if mixing.scale == "guidance_scale":
            if scale > mixing.least:
                self._check_two_predictions(arguments)
            return bool(scale > mixing.least)
        if "true_cfg_scale" in given and scale <= 1:
            return False
        if scale <= 1 or all(arguments.get(name) is None for name in ("negative_prompt", "negative_prompt_embeds")):
            raise ValueError(
                "Expected two predictions to mix, but this call of a guidance-distilled model makes one: pass "
                '`negative_prompt=""` and a `true_cfg_scale` above 1, for example 4.0, or `use_scfg=False`.'
            )
        return True

    def _check_two_predictions(self, arguments) -> None:
        """A loop of diffusers with one denoiser that takes nothing negative makes one prediction: it is distilled."""
        stock, denoisers = stock_of(type(self)), denoisers_of(self.components)
        negative = any("negative" in name for name in arguments) or not stock.__module__.startswith("diffusers.")
        if len(denoisers) == 1 and not negative:
            raise ValueError(
                f"Expected a loop that mixes two predictions, but {stock.__name__} makes one (its guidance is distilled): "
                "pass use_scfg=False."
            )

    def _scale_in(self, arguments) -> float:
        """The scale of the step in progress."""
        scales, call = scales_of(mixing_of(stock_of(type(self))), arguments), self._goca_call
        return self.guidance_scale if call is None or len(scales) == 1 else scales[call.step - 1]

    def _guided_call(self, arguments, goca, scfg, **kwargs) -> GuidedCall:
        denoisers, (prompts, images) = denoisers_of(self.components), counts(arguments)
        check_alone(self.components, denoisers)
        return GuidedCall(
            denoisers,
            text_encoders_of(self, family_of(denoisers[0])),
            goca,
            scfg,
            rule=self.guidance_rule,
            images=images,
            prompts=prompts,
            prompt_read=arguments["prompt"] is not None,
            separate=None,
            mixing=mixing_of(stock_of(type(self))),
            scale=lambda: self._scale_in(arguments),
            own=OwnCalls(self, denoisers),
            asked=self._asked(arguments, prompts),
            **kwargs,
        )

    def _asked(self, arguments, prompts) -> Asked:
        """The texts of a call, as its encoders may read them."""
        parts = [part for name, part in self.components.items() if "tokenizer" in name and part is not None]
        tokenizers = parts or [None]

        def forms(name):
            given = [arguments.get(key) for key in (name, *(f"{name}_{number}" for number in (2, 3, 4)))]
            texts = [each for number, each in enumerate(given) if number == 0 or each is not None]
            return [
                form
                for each in texts
                for t in tokenizers
                for form in forms_of(each, prompts, partial(self._as_read, tokenizer=t))
            ]

        return Asked(
            forms("prompt"), forms("negative_prompt"), stock_of(type(self)).__module__.startswith("diffusers.")
        )

    def _window(self, start: float, stop: float) -> Callable[[int], bool]:
        """Which steps lie between two fractions of them. They are counted once: a callback may use the scheduler."""

        @functools.cache
        def count():
            return max(1, getattr(self, "num_timesteps", None) or len(self.scheduler.timesteps))

        def holds(step: int) -> bool:
            if (start, stop) == (0, 1):
                return True
            if step >= count():
                raise RuntimeError(
                    f"Expected {count()} steps, of which `scfg_start` and `scfg_stop` are fractions, but this loop makes "
                    "more: leave them at 0 and 1."
                )
            return start <= step / count() < stop

        return holds

    def _check_latents(self, arguments):
        channels = getattr(getattr(getattr(self, "vae", None), "config", None), "latent_channels", None)
        if is_text_to_image(stock_of(type(self))):
            family = family_of(denoiser_of(self.components))
            check_latents(arguments.get("latents"), family, channels, counts(arguments)[1])

    def _run(self, stock, arguments, state):
        """The stock call; with a state, observed, and its scale spatial: as argument, and as property (`guidance_scale`)."""
        if state is None:
            return stock(**{**arguments, "return_dict": True})
        if state.mixing.product:
            scales = [name for name in (state.mixing.scale, *FURTHER) if arguments.get(name) is not None]
            arguments |= {name: SpatialGuidanceScale(float(arguments[name]), state.rate) for name in scales}
        with finite_pictures(getattr(self, "vae", None)), or_plain(), state.installed(), self._in_call(state):
            output = state.own.run(stock, {**arguments, "return_dict": True})
        if not getattr(self, "interrupt", False):
            state.check()
        return output

    @contextmanager
    def _in_call(self, state):
        key = id(self), threading.get_ident()
        outer = _CALLS.get(key)  # a callback may call this very pipeline
        try:
            _CALLS[key] = state
            yield
        finally:
            if outer is None:
                _CALLS.pop(key, None)
            else:
                _CALLS[key] = outer
            if isinstance(getattr(self, "_guidance_scale", None), SpatialGuidanceScale):
                self._guidance_scale = float(self._guidance_scale)

    # ---- real images, and the words of prompts ------------------------------------------------------------------------
    @checked
    def segment(
        self,
        images,
        classes: Sequence[str] | Sequence[Sequence[str]],
        *,
        prompt: str | Sequence[str] | None = None,
        timestep: int | Sequence[int] | None = None,
        num_noises: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        background: float | Sequence[str] | Background | None = None,
        height: int | None = None,
        width: int | None = None,
        goca: GoCAConfig | None = None,
        segmentor: Callable[..., ScoringSegmentor] = GoCASegmentor,
        crf: CRF | None = None,
        **arguments,
    ) -> Segmentation:
        """Segment real images by class names (GoCA, arXiv 2603.06178): noise at `timestep`, one forward, regions, argmax.

        Args:
            images: an image or a list: PIL, path, or H W 3 array (uint8, or float in [0, 1]). Any size; every PIL mode of 8 or
                16 bits a channel is read as RGB, transparency over white.
            classes: names, of one word or more, for all images, or a list of them for each image. Each pixel gets one of them
                (or the background). A name can hold several phrases, separated by commas, as in "person, hat": its map
                averages over the words of all.
            prompt: what the model reads, for all images or one for each; it must hold every class (and background) name. By
                default the names joined by commas. It is padded to the stock pipeline's default length.
            timestep: of the scheduler's training steps; None takes the configuration's, or the preset's. Several are averaged.
                A flow-matching schedule is shifted for the image's size, as in generation.
            num_noises: noise samples to average.
            generator: one, or one for each image. None is a fixed seed, 0, so that a call repeats itself.
            background: None for no background; a number is a constant threshold; names are background entities; see
                [`Background`].
            height, width: size that the image is resized to for the model, in pixels; None is the model's native size.
            goca: how attention becomes maps.
            segmentor: what makes the maps, a [`~goca_guidance.method.segmentor.ScoringSegmentor`].
            crf: constants of a fully connected CRF on the picture, which moves borders to the picture's own (ours; the paper
                has none); `CRF()` are those of FTTM and GoCA's re-implementation of it. On the CPU.
            arguments: further ones of the stock pipeline's call that matter to a forward, such as `max_sequence_length` (Flux
                reads 512 text tokens by default, mostly padding).

        Returns:
            [`Segmentation`]: `scores` b k H W, `label_maps`, `classes`.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "arguments")}
        return segment(self, self._text_to_image_class(), **given, **arguments)

    @checked
    def discover(
        self,
        images,
        *,
        threshold: float = 0.5,
        alpha: float = 10.0,
        timestep: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
        size: int = 128,
        layer: str | None = None,
    ) -> list[Tensor]:
        """Segment real images without names (DiffCut, arXiv 2406.02842): recursive normalised cut of dense features.

        The features are what a self-attention layer of a U-Net puts out, for an empty prompt.

        Args:
            images, generator, height, width: see [`~GoCASCFGPipeline.segment`].
            threshold: a segment is cut in two while the normalised cut costs less (the paper's tau).
            alpha: exponent of the affinity.
            timestep: at which the image is noised, of the scheduler's training steps; None is the paper's, 50.
            size: side of the map on which pixels choose the nearest segment.
            layer: name of a self-attention layer, such as "down_blocks.1.attentions.0"; None is the last one of the encoder.

        Returns:
            One H W int64 map for each image, at its own size: numbers of segments, which mean nothing beyond the image.
        """
        given = {name: value for name, value in locals().items() if name != "self"}
        return discover(self, self._text_to_image_class(), **given)

    def _text_to_image_class(self):
        """The text-to-image class that runs these components."""
        stock = stock_of(type(self))
        return stock if is_text_to_image(stock) else named_pipeline(family_of(denoiser_of(self.components)))

    @checked
    def words(self, prompt: str, **arguments) -> dict[str, list[int]]:
        """The words of a prompt with their token positions, in the form that `region_tokens` takes.

        `arguments`: those of the stock call that say how a prompt is read, such as `max_sequence_length`.
        """
        check_further("words", self._text_to_image_class(), arguments, {})
        family = family_of(denoiser_of(self.components))
        tokenizers = [bare(tokenizer) for _, tokenizer in text_encoders_of(self, family)]
        if not all(map(has_marks, tokenizers)):
            return named_words(Reading(self, family).run(self._text_to_image_class(), prompt, arguments), family.sink)
        limit = inspect.signature(stock_of(type(self)).__call__).parameters.get("max_sequence_length")
        longest = arguments.get("max_sequence_length", None if limit is None else limit.default)
        return named_words(tokenise(prompt, tokenizers, self._as_read, longest), family.sink)

    def _as_read(self, prompt: str, tokenizer) -> str:
        """The text that the stock pipeline gives to its tokenizer: cleaned (PixArt), textual inversions spelled out."""
        if hasattr(self, "_text_preprocessing"):
            prompt = self._text_preprocessing(prompt, clean_caption=True)[0]
        converts = tokenizer is not None and hasattr(self, "maybe_convert_prompt")
        return self.maybe_convert_prompt(prompt, tokenizer) if converts else prompt

    # ---- loading and saving ------------------------------------------------------------------------------------------
    @classmethod
    @checked
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, **kwargs):
        """Load as `DiffusionPipeline.from_pretrained` does; the repository or `custom_pipeline` says which pipeline it is."""
        if "dtype" in kwargs and not hasattr(pipeline_utils, "_resolve_dtype"):  # diffusers before 0.40
            kwargs["torch_dtype"] = kwargs.pop("dtype")
        check_folder(pretrained_model_name_or_path, kwargs)
        if cls is GoCASCFGPipeline and kwargs.get("custom_pipeline") is not None:
            loaded = DiffusionPipeline.from_pretrained(pretrained_model_name_or_path, **kwargs)
        else:
            stock: Any = stock_class(pretrained_model_name_or_path, **kwargs) if cls is GoCASCFGPipeline else cls
            loaded = super(GoCASCFGPipeline, guided(stock)).from_pretrained(pretrained_model_name_or_path, **kwargs)
        return loaded if isinstance(loaded, GoCASCFGPipeline) else GoCASCFGPipeline.from_pipe(loaded)

    @classmethod
    @checked
    def from_single_file(cls, pretrained_model_link_or_path: str | PathLike, **kwargs):
        """Load a checkpoint that is one file, as the stock class's `from_single_file` does.

        Args:
            pretrained_model_link_or_path: a file, or its address on the hub.
            kwargs: those of stock; `config`, a repository or folder in diffusers' form, says which pipeline it is. Without it
                the weights say, and their configuration is downloaded.
        """
        stock: Any = single_file_class(pretrained_model_link_or_path, **kwargs) if cls is GoCASCFGPipeline else cls
        if not hasattr(stock_of(guided(stock)), "from_single_file"):
            raise ValueError(
                f"Expected a pipeline that diffusers loads from one file, but {stock.__name__} is none: convert the "
                "checkpoint to a folder, and use `from_pretrained`."
            )
        return super(GoCASCFGPipeline, guided(stock)).from_single_file(pretrained_model_link_or_path, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        r"""
        A pipeline that shares every module of `pipeline` and leaves its dtype and device alone.

        Args:
            pipeline: a loaded pipeline of any supported family and task.
            kwargs: components or settings that replace the ones of `pipeline`; `dtype` converts the shared modules.
        """
        if not all(hasattr(pipeline, name) for name in ("components", "config")):
            raise TypeError(
                f"Expected a loaded pipeline, but got {shown(pipeline)}: load it first, or use `from_pretrained`."
            )
        if cls is GoCASCFGPipeline:
            denoiser, ours = denoiser_of(pipeline.components), guided(stock_of(type(pipeline)))
            family_of(denoiser).preset  # noqa: B018 (refuses what has no readable layers)
            return ours.from_pipe(pipeline, **kwargs)
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        parameters = {name: p for name, p in inspect.signature(cls.__init__).parameters.items() if name != "self"}
        check_names(kwargs, parameters, f"a component or a setting of {stock_of(cls).__name__}")
        settings = {name: value for name, value in pipeline.config.items() if name in parameters}
        arguments = {**settings, **{n: c for n, c in pipeline.components.items() if n in parameters}, **kwargs}
        needed = {name for name, p in parameters.items() if p.default is p.empty}
        if missing := sorted(needed - set(arguments)):
            raise ValueError(
                f"Expected a pipeline with the components of {stock_of(cls).__name__}, but {type(pipeline).__name__} has no "
                f"{', '.join(missing)}. Use a pipeline of that family."
            )
        ours = cls(**arguments)
        return ours if dtype is None else ours.to(dtype=dtype)

    def __reduce_ex__(self, protocol):
        """Pickled and copied by the stock class, from which ours is made anew: it cannot be found by its name."""
        made, stock = super().__reduce_ex__(protocol), stock_of(type(self))
        return (_empty, (stock,), *made[2:]) if type(self) is guided(stock) else made

    @property
    def config(self):
        """The stock configuration. An `AutoPipeline` asks for it before it looks for the class by name: then it finds it."""
        join_auto_pipelines(guided)
        return super().config

    def to_json_string(self) -> str:
        """What is saved names the stock pipeline: anyone can load it, with us or without."""
        saved = {**json.loads(super().to_json_string()), "_class_name": stock_of(type(self)).__name__}
        return json.dumps(saved, indent=2, sort_keys=True) + "\n"


def stock_of(cls: type) -> type[DiffusionPipeline]:
    """The class that does the work: the first one that is not ours."""
    return next(base for base in cls.__mro__ if not issubclass(base, GoCASCFGPipeline))


@functools.cache
def guided(stock: type[DiffusionPipeline]) -> type[GoCASCFGPipeline]:
    """The subclass of a stock pipeline class and of ours."""
    if issubclass(stock, GoCASCFGPipeline):
        return stock
    if reason := unserved(stock):
        raise ValueError(
            f"Expected a pipeline that regions can guide, but {stock.__name__} is none ({reason}): use it as it is."
        )
    if "guider" in inspect.signature(stock.__init__).parameters:
        raise ValueError(
            f"Expected a pipeline whose loop mixes two predictions, but a guider mixes those of {stock.__name__}: give it "
            "`guider=GoCAGuidance(...)`, and call it inside `with guider.watching(pipe):`."
        )
    if "prompt" not in inspect.signature(stock.__call__).parameters or mixing_of(stock).scale is None:
        raise ValueError(
            "Expected a text-to-image pipeline whose loop mixes two predictions by a `guidance_scale` or a `true_cfg_scale`, "
            f"but {stock.__name__} is none."
        )
    return type(
        f"{PREFIX}{stock.__name__}", (GoCASCFGPipeline, stock), {"__module__": __name__, "__doc__": stock.__doc__}
    )


def _empty(stock: Any) -> GoCASCFGPipeline:
    """An instance of the made class, for pickle to fill."""
    return object.__new__(guided(stock))


def __getattr__(name: str):
    """The made classes by name, as pickle asks for them."""
    if name.startswith(PREFIX) and hasattr(diffusers, name.removeprefix(PREFIX)):
        return guided(getattr(diffusers, name.removeprefix(PREFIX)))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _output(stock, state, return_dict, regions, negative_maps):
    """The stock output's fields, then ours."""
    found = ([], None, []) if state is None else state.results()
    ours = {"regions": found[0], "guidance_maps": found[1]} if regions else {}
    ours |= {"negative_maps": found[2]} if negative_maps else {}
    fields = {field.name: getattr(stock, field.name) for field in dataclasses.fields(stock)}
    if not return_dict:
        return (*fields.values(), *ours.values())
    if set(fields) <= {field.name for field in dataclasses.fields(GoCASCFGPipelineOutput)}:
        return GoCASCFGPipelineOutput(**fields, **ours)
    for name, value in ours.items():  # an output of another kind
        stock[name] = value
    return stock


@functools.cache
def _our_arguments() -> dict[str, Any]:
    """The annotations of the arguments that we add to a stock call."""
    parameters = inspect.signature(GoCASCFGPipeline.__call__).parameters
    hints = get_type_hints(GoCASCFGPipeline.__call__, include_extras=True)
    return {name: hints[name] for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
