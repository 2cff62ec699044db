"""Conditional forwards of a stock pipeline on noised real images: the one way in which real images are read."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from goca_guidance.denoisers.adapters import denoiser_of, family_of, text_encoders_of
from goca_guidance.denoisers.base import Family
from goca_guidance.hooks.watch import Watch
from goca_guidance.real_images.load import load_image
from goca_guidance.real_images.noising import HandingScheduler, encode, latent_channels, noisy_latents, patchified
from goca_guidance.schema import Count, check_names, read
from goca_guidance.stock import PREFIX, exact_arguments, unguided


NATIVE = 1024  # pixels on a side, where neither pipeline nor denoiser names a size: what today's models are trained on


@dataclass(frozen=True)
class Noised:
    """Real images as a denoiser sees them: `samples` are (timestep as the denoiser is told it, latents b c H W).

    `size`: height and width in pixels, to which the pictures were resized.
    """

    family: Family
    pictures: list[Image.Image]
    size: tuple[int, int]
    samples: list[tuple[float, Float[Tensor, "b c H W"]]]


def noised(
    pipe: DiffusionPipeline,
    images,
    timestep: int | Sequence[int] | None = None,
    num_noises: int = 1,
    generator: torch.Generator | list[torch.Generator] | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Noised:
    """Encode images and add noise; see [`goca_guidance.real_images.segment.segment`] for the arguments."""
    pictures = [load_image(image) for image in (images if isinstance(images, (list, tuple)) else [images])]
    if not pictures:
        raise ValueError("Expected at least one image, but got an empty list.")
    family = family_of(denoiser_of(pipe.components))
    with readable(pipe):
        return _noised(pipe, family, pictures, timestep, num_noises, generator, height, width)


def _noised(pipe, family, pictures, timestep, num_noises, generator, height, width) -> Noised:
    if hasattr(pipe, "video_processor"):
        raise ValueError(
            "Expected a plain text-to-image pipeline of pictures for segmentation, but "
            f"{type(pipe).__name__.removeprefix(PREFIX)} makes videos: use a model of pictures."
        )
    timesteps = _timesteps(timestep, family.preset.timestep, pipe.scheduler.config.num_train_timesteps - 1)
    _check_checkpoint(pipe, family)
    if isinstance(generator, list) and len(generator) != len(pictures):
        raise ValueError(
            f"Expected one generator, or one for each of the {len(pictures)} images, but got {len(generator)}."
        )
    dtype = family.denoiser.dtype if family.denoiser.dtype.itemsize > 1 else pipe.vae.dtype  # fp8 is for storage
    rows, columns = _size(pipe, family, height, width)
    latents = encode(pipe, pictures, rows, columns, dtype)
    samples = noisy_latents(pipe, family, latents, timesteps, num_noises, generator)
    return Noised(family, pictures, (rows, columns), samples)


@contextmanager
def readable(pipe: DiffusionPipeline):
    """Refuse a pipeline whose parts or loop turn out to be others than those of a text-to-image one, which alone are read.

    There are too many ways to be another (videos, sounds, boxes, depths, loops that ask more of a scheduler) to name them.
    """
    try:
        yield
    except (AttributeError, TypeError) as error:
        name, reason = type(pipe).__name__.removeprefix(PREFIX), " ".join(str(error).split())
        raise ValueError(
            f"Expected a plain text-to-image pipeline of pictures for segmentation, but {name} works otherwise ({reason}): "
            "load the checkpoint as the plain one of its family, such as StableDiffusionPipeline."
        ) from error


def _timesteps(timestep, default, last):
    chosen = default if timestep is None else timestep
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    if not chosen or not all(0 <= t <= last for t in chosen):
        raise ValueError(f"Expected timesteps from 0 to {last}, but got {chosen}.")
    return chosen


def _check_checkpoint(pipe, family):
    """Reading needs a plain text-to-image checkpoint; others generate, but ask for more than an image and words."""
    config = family.denoiser.config
    if (
        getattr(family.denoiser, "encoder_hid_proj", None) is not None
        and config.get("encoder_hid_dim") is None  # else it projects the text
    ):
        raise ValueError("Expected no IP-Adapter for segmentation: call `pipe.unload_ip_adapter()` first.")
    if not any(module is not None for module, _ in text_encoders_of(pipe, family)):
        raise ValueError("Expected a text encoder for segmentation, but the pipeline has none loaded.")
    channels = latent_channels(pipe.vae) * (family.patch**2 if family.packed else 1)
    if config.get("in_channels", channels) != channels or pipe.config.get("requires_aesthetics_score"):
        raise ValueError(
            "Expected a text-to-image checkpoint for segmentation, but this one is a refiner, or paints into pictures "
            f"({config.in_channels} input channels): use its base checkpoint."
        )


def _size(pipe, family, height, width):
    native = getattr(pipe, "default_sample_size", None) or family.denoiser.config.get("sample_size")
    native = native or NATIVE // pipe.vae_scale_factor
    native = (native, native) if isinstance(native, int) else tuple(native)
    size = tuple(given or side * pipe.vae_scale_factor for given, side in zip((height, width), native, strict=True))
    step = pipe.vae_scale_factor * family.patch * patchified(pipe.vae)
    if any(side % step for side in size):  # before any work is done
        raise ValueError(f"Expected height and width divisible by {step}, but got {size[0]} x {size[1]}.")
    return size


SET = (  # arguments of a stock call that are set here, or that do not matter to a forward
    *("prompt", "image", "height", "width", "latents", "generator", "num_inference_steps", "timesteps", "sigmas"),
    *("strength", "negative_prompt", "guidance_rescale", "num_images_per_prompt", "output_type", "return_dict", "eta"),
    *("callback_on_step_end", "callback_on_step_end_tensor_inputs", "prompt_embeds", "true_cfg_scale", "pag_scale"),
)


def check_further(
    door: str, stock: type[DiffusionPipeline], arguments: Mapping[str, Any], ours: Mapping[str, Any]
) -> None:
    """TypeError or ValueError for what is no argument of a stock call that matters to a forward.

    `ours`: the annotations of the arguments of the `door` itself (segment, words), for which one may be misspelled.
    """
    parameters = inspect.signature(stock.__call__).parameters.values()
    known = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"self", *SET}
    check_names(arguments, known | set(ours), f"an argument of {door}", ours)
    if "max_sequence_length" in arguments:
        read("max_sequence_length", arguments["max_sequence_length"], Count)


class Forwards(Watch):
    """One conditional forward for each noise sample, in one run of a stock pipeline, and the mean of what they give.

    The pipeline is a fresh one on the same components: its scheduler hands out the samples, one a step, and nothing of the
    caller's pipeline is touched. Where it is not known which latents a pipeline takes, it draws its own, and the samples take
    their place when the denoiser is called. A subclass opens a forward with `begin` and reads it with `result`.
    """

    def __init__(self, pipe: DiffusionPipeline, family: Family):
        super().__init__([family], text_encoders_of(pipe, family))
        self.pipe, self.prompts = pipe, list[str]()
        self._results: list[Tensor] = []
        self._handed: list[Tensor] = []  # samples that are to take the place of the pipeline's own
        self._begun = False

    def begin(self, device: torch.device) -> None:
        """A forward begins."""

    def result(self) -> Tensor:
        """What the forward that just ended gave."""
        raise NotImplementedError

    def run(
        self,
        stock: type[DiffusionPipeline],
        prompts: Sequence[str],
        samples: Sequence[tuple[float, Tensor]],
        size: tuple[int, int] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Mean result of the noise samples (see `Noised`); `stock` is the text-to-image class that runs the components.

        `size`: of the pictures, where latents are no patches it can be left out; `arguments`: further ones of the call.
        """
        handed = [self.family.pack(latents) for _, latents in samples]
        height, width = size or (side * self.pipe.vae_scale_factor for side in samples[0][1].shape[-2:])
        known = self.family.latents(1) is not None
        steps = [(t, latents if known else None) for (t, _), latents in zip(samples, handed, strict=True)]
        self._handed = [] if known else handed
        with readable(self.pipe):
            runner = fresh(stock, self.pipe, HandingScheduler(self.pipe.scheduler.config, steps))
        ours, self.prompts = {"latents": handed[0]} if known else {}, list(prompts)
        with self.installed(), readable(self.pipe):
            runner(
                prompt=self.prompts,
                height=height,
                width=width,
                num_inference_steps=len(handed),
                output_type="latent",
                **ours | unguided(stock) | exact_arguments(stock) | dict(arguments or {}),
            )
            self._end()
        self.pipe.maybe_free_model_hooks()
        if not self._results:
            raise RuntimeError(
                "Expected the denoiser to be called in this thread, but it was called in another one or not at all: use the "
                "model itself, not a wrapper that runs it elsewhere."
            )
        return torch.stack(self._results).mean(0)

    def on_forward(self, call: Any, device: torch.device) -> None:
        self._end()
        self.begin(device)
        self._begun = True

    def hand(self, sample: Tensor) -> Tensor | None:
        if not self._handed:
            return None
        handed = self._handed[len(self._results)].to(sample.dtype)
        if handed.shape != sample.shape:
            raise ValueError(
                f"Expected a plain text-to-image pipeline for segmentation, whose denoiser gets latents of shape "
                f"{tuple(handed.shape)} for these images, but it gets {tuple(sample.shape)}: use another checkpoint or size."
            )
        return handed

    def _end(self):
        if self._begun:
            self._results.append(self.result())
        self._begun = False


def fresh(stock, pipe, scheduler) -> DiffusionPipeline:
    """A silent stock pipeline on the components of another."""
    parameters = inspect.signature(stock.__init__).parameters
    settings = {name: value for name, value in pipe.config.items() if name in parameters}
    components = {name: part for name, part in pipe.components.items() if name in parameters}
    if "safety_checker" in parameters:
        components |= {"safety_checker": None, "requires_safety_checker": False}
    runner = stock(**{**settings, **components, "scheduler": scheduler})
    runner.set_progress_bar_config(disable=True)
    return runner
