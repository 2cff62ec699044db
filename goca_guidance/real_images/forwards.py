"""Conditional forwards of a stock pipeline on noised real images: the one way in which real images are read."""

import inspect
from collections.abc import Sequence
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
from goca_guidance.real_images.noising import HandingScheduler, encode, noisy_latents
from goca_guidance.stock import PREFIX, exact_arguments


@dataclass(frozen=True)
class Noised:
    """Real images as a denoiser sees them: `samples` are (timestep as the denoiser is told it, latents b c H W)."""

    family: Family
    pictures: list[Image.Image]
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
    timesteps = _timesteps(timestep, family.preset.timestep, pipe.scheduler.config.num_train_timesteps - 1)
    _check_checkpoint(pipe, family)
    if isinstance(generator, list) and len(generator) != len(pictures):
        raise ValueError(
            f"Expected one generator, or one for each of the {len(pictures)} images, but got {len(generator)}."
        )
    dtype = family.denoiser.dtype if family.denoiser.dtype.itemsize > 1 else pipe.vae.dtype  # fp8 is for storage
    rows, columns = _size(pipe, family, height, width)
    latents = encode(pipe, pictures, rows, columns, dtype)
    return Noised(family, pictures, noisy_latents(pipe, latents, timesteps, num_noises, generator))


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
        and config.get("encoder_hid_dim_type") != "text_proj"
    ):
        raise ValueError("Expected no IP-Adapter for segmentation: call `pipe.unload_ip_adapter()` first.")
    if not any(module is not None for module, _ in text_encoders_of(pipe, family)):
        raise ValueError("Expected a text encoder for segmentation, but the pipeline has none loaded.")
    channels = family.patch**2 if family.packed else 1
    if config.in_channels != channels * pipe.vae.config.latent_channels or pipe.config.get(
        "requires_aesthetics_score"
    ):
        raise ValueError(
            "Expected a text-to-image checkpoint for segmentation, but this one is a refiner, or paints into pictures "
            f"({config.in_channels} input channels): use its base checkpoint."
        )


def _size(pipe, family, height, width):
    config = family.denoiser.config
    native = getattr(pipe, "default_sample_size", None) or config.sample_size
    native = (native, native) if isinstance(native, int) else tuple(native)
    size = tuple(given or side * pipe.vae_scale_factor for given, side in zip((height, width), native, strict=True))
    step = pipe.vae_scale_factor * family.patch
    if any(side % step for side in size):  # before any work is done
        raise ValueError(f"Expected height and width divisible by {step}, but got {size[0]} x {size[1]}.")
    return size


class Forwards(Watch):
    """One conditional forward for each noise sample, in one run of a stock pipeline, and the mean of what they give.

    The pipeline is a fresh one on the same components: its scheduler hands out the samples, one a step, and nothing of the
    caller's pipeline is touched. A subclass opens a forward with `begin` and reads it with `result`.
    """

    def __init__(self, pipe: DiffusionPipeline, family: Family):
        super().__init__([family], text_encoders_of(pipe, family))
        self.pipe = pipe
        self._results: list[Tensor] = []
        self._begun = False

    def begin(self, device: torch.device) -> None:
        """A forward begins."""

    def result(self) -> Tensor:
        """What the forward that just ended gave."""
        raise NotImplementedError

    def run(
        self, stock: type[DiffusionPipeline], prompts: Sequence[str], samples: Sequence[tuple[float, Tensor]]
    ) -> Tensor:
        """Mean result of the noise samples (see `Noised`); `stock` is the text-to-image class that runs the components."""
        height, width = samples[0][1].shape[-2:]
        handed = [(t, self.family.pack(latents)) for t, latents in samples]
        with readable(self.pipe):
            runner = _fresh(stock, self.pipe, HandingScheduler(self.pipe.scheduler.config, handed))
        off = {"guidance_scale": 1.0, "true_cfg_scale": 1.0, "pag_scale": 0.0}
        known = inspect.signature(stock.__call__).parameters
        with self.installed(), readable(self.pipe):
            runner(
                list(prompts),
                height=height * self.pipe.vae_scale_factor,
                width=width * self.pipe.vae_scale_factor,
                latents=handed[0][1],
                num_inference_steps=len(handed),
                output_type="latent",
                **{name: value for name, value in off.items() if name in known},
                **exact_arguments(stock),
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

    def _end(self):
        if self._begun:
            self._results.append(self.result())
        self._begun = False


def _fresh(stock, pipe, scheduler) -> DiffusionPipeline:
    """A silent stock pipeline on the components of another."""
    parameters = inspect.signature(stock.__init__).parameters
    settings = {name: value for name, value in pipe.config.items() if name in parameters}
    components = {name: part for name, part in pipe.components.items() if name in parameters}
    if "safety_checker" in parameters:
        components |= {"safety_checker": None, "requires_safety_checker": False}
    runner = stock(**{**settings, **components, "scheduler": scheduler})
    runner.set_progress_bar_config(disable=True)
    return runner
