"""Segmentation of real images: one conditional forward of the stock pipeline on a noised image (GoCA, section on setup)."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Int
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from goca_guidance.config import Background, GoCAConfig
from goca_guidance.families import family_of
from goca_guidance.goca import GoCASegmentor
from goca_guidance.maps import resize
from goca_guidance.observer import AttentionObserver, check_seen
from goca_guidance.records import Segmentation
from goca_guidance.tokens import class_layout, encoder_ids


SMALLEST = 8  # pixels on a side


@torch.no_grad()
def segment(
    pipe,
    stock_call: Callable,
    images,
    classes: Sequence[str],
    *,
    prompt: str | Sequence[str] | None = None,
    timestep: int | Sequence[int] | None = None,
    num_noises: int = 1,
    generator: torch.Generator | list[torch.Generator] | None = None,
    background: "float | Sequence[str] | Background | None" = None,
    height: int | None = None,
    width: int | None = None,
    goca: GoCAConfig | None = None,
) -> Segmentation:
    """Segment real images by class names (GoCA, arXiv 2603.06178): noise at `timestep`, one forward, regions, argmax.

    Args:
        pipe: the pipeline; `stock_call` is its stock `__call__`.
        images: an image or a list: PIL, path, or H W 3 array (uint8, or float in [0, 1]). Any size; every PIL mode of 8 or
            16 bits a channel is read as RGB, transparency over white.
        classes: names, of one word or more. Each pixel gets one of them (or the background).
        prompt: what the model reads, for all images or one for each; it must hold every class (and background) name. By
            default the names joined by commas.
        timestep: of the scheduler's training steps; None takes the preset's. Several are averaged.
        num_noises: noise samples to average.
        generator: one, or one for each image. None is a fixed seed, 0, so that a call repeats itself.
        background: None for no background; a number is a constant threshold; names are background entities; see
            [`Background`].
        height, width: size that the image is resized to for the model, in pixels; None is the model's native size.
        goca: how attention becomes maps.

    Returns:
        [`Segmentation`].
    """
    if num_noises < 1:
        raise ValueError(f"Expected at least one noise, but got num_noises={num_noises}.")
    rule = None if background is None else Background.of(background)
    names = _checked_names(classes, rule)
    pictures = [load_image(image) for image in (images if isinstance(images, (list, tuple)) else [images])]
    if not pictures:
        raise ValueError("Expected at least one image, but got an empty list.")
    prompts = _prompts(prompt, names, len(pictures))
    family = family_of(pipe.unet)
    timesteps = _timesteps(timestep, family.preset.timestep, pipe.scheduler.config.num_train_timesteps - 1)
    if pipe.unet.config.encoder_hid_dim_type == "ip_image_proj":
        raise ValueError("Expected no IP-Adapter for segmentation: call `pipe.unload_ip_adapter()` first.")
    latents = encode(pipe, pictures, *_size(pipe, height, width))
    if generator is None:
        generator = [torch.Generator().manual_seed(0) for _ in pictures]
    if isinstance(generator, list) and len(generator) != len(pictures):
        raise ValueError(
            f"Expected one generator, or one for each of the {len(pictures)} images, but got {len(generator)}."
        )
    embeds, layout = _read(pipe, prompts, names, latents.device)
    noiser, scores = DDPMScheduler.from_config(pipe.scheduler.config), []
    for t in timesteps:
        for _ in range(num_noises):
            noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
            noisy = noiser.add_noise(latents, noise, torch.tensor([t], device=latents.device))
            scores.append(_forward(pipe, family, stock_call, noisy, t, embeds, layout, goca or GoCAConfig()))
    return _result(torch.stack(scores).mean(0), pictures, tuple(classes), rule)


# ---- input -----------------------------------------------------------------------------------------------------------
def load_image(image) -> Image.Image:
    """An RGB picture from a path, PIL image or array; transparency is laid over white, and the camera's rotation applied."""
    if isinstance(image, (str, Path)):
        try:
            with Image.open(image) as file:
                file.load()
                image = file.copy()
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"Expected a readable image file, but {str(image)!r} is not one: {error}") from error
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if not isinstance(image, Image.Image):
        raise TypeError(f"Expected an image as a path, PIL image or H W 3 array, but got {type(image).__name__}.")
    if min(image.size) < SMALLEST:
        raise ValueError(
            f"Expected an image of at least {SMALLEST} x {SMALLEST} pixels, but got {image.width} x {image.height}."
        )
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip sixteen bits to eight
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"Expected 8 or 16 bits a channel, but got mode {image.mode!r}: scale it to 0..255 first.")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _from_array(array):
    if array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(f"Expected an array of shape H W 3, but got {array.shape}.")
    if array.dtype != np.uint8:
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ValueError("Expected a uint8 array, or a float array of finite values in [0, 1].")
        array = (array * 255).round().astype(np.uint8)
    return Image.fromarray(array)


def _checked_names(classes, rule):
    if isinstance(classes, str):
        raise TypeError(f'Expected a list of class names, but got the string {classes!r}: use ["{classes}"].')
    names = [*classes, *(rule.entities if rule else ())]
    if not classes or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"Expected at least one class name and no empty ones, but got {list(names)}.")
    spelled = [" ".join(name.lower().split()) for name in names]
    if repeated := sorted({name for name in spelled if spelled.count(name) > 1}):
        raise ValueError(
            f"Expected every class and background name once, but got {', '.join(repeated)} more than once."
        )
    return names


def _prompts(prompt, names, count):
    prompts = (
        [", ".join(names)] * count if prompt is None else [prompt] * count if isinstance(prompt, str) else list(prompt)
    )
    if len(prompts) != count:
        raise ValueError(f"Expected one prompt, or one for each of the {count} images, but got {len(prompts)}.")
    return prompts


def _timesteps(timestep, default, last):
    chosen = default if timestep is None else timestep
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    if not chosen or not all(0 <= t <= last for t in chosen):
        raise ValueError(f"Expected timesteps from 0 to {last}, but got {chosen}.")
    return chosen


def _size(pipe, height, width):
    native = pipe.unet.config.sample_size
    native = (native, native) if isinstance(native, int) else tuple(native)
    size = tuple(own or side * pipe.vae_scale_factor for own, side in zip((height, width), native, strict=True))
    if any(side % 8 for side in size):  # the stock pipeline's rule, before any work is done
        raise ValueError(f"Expected height and width divisible by 8, but got {size[0]} x {size[1]}.")
    return size


# ---- the forward -----------------------------------------------------------------------------------------------------
def encode(pipe, pictures: Sequence[Image.Image], height: int, width: int) -> Float[Tensor, "b c H W"]:
    """Scaled latents, the mean of the posterior; every picture is squeezed to the same height and width."""
    pixels = pipe.image_processor.preprocess(list(pictures), height=height, width=width)
    device = pipe._execution_device
    mean = pipe.vae.encode(pixels.to(device, pipe.vae.dtype)).latent_dist.mode()
    return mean * pipe.vae.config.scaling_factor


def _read(pipe, prompts, names, device):
    """Text embeddings, and where the names stand in the tokens that the encoder really read."""
    ids = []

    def keep_ids(module, args, kwargs):
        ids.append(encoder_ids(args, kwargs))

    hook = pipe.text_encoder.register_forward_pre_hook(keep_ids, with_kwargs=True)
    try:
        embeds, _ = pipe.encode_prompt(prompts, device, 1, False)
    finally:
        hook.remove()
    return embeds, class_layout(pipe.tokenizer, ids[0], names).to(device)


def _forward(pipe, family, stock_call, noisy, timestep, embeds, layout, config) -> Float[Tensor, "b k H W"]:
    """Region scores of one noise sample at one timestep: the stock pipeline runs exactly one conditional step."""
    latent = tuple(noisy.shape[-2:])
    segmentor = GoCASegmentor(config, family.preset, layout, guided=False)
    observer = AttentionObserver(
        {name: module for name, module in family.attention_modules.items() if name in segmentor.layers},
        segmentor.keep,
        lambda pixels: family.grid(pixels, latent),
        projected=frozenset(family.preset.cross),
    )
    with _frozen(pipe, timestep), torch.compiler.set_stance("force_eager"), observer:
        stock_call(
            prompt_embeds=embeds,
            height=latent[0] * pipe.vae_scale_factor,
            width=latent[1] * pipe.vae_scale_factor,
            latents=noisy,
            num_inference_steps=1,
            guidance_scale=1.0,
            output_type="latent",
        )
    check_seen(segmentor.layers, observer.seen)
    with torch.autocast(noisy.device.type, enabled=False):
        return segmentor.scores()


class FrozenScheduler(SchedulerMixin):
    """A schedule of one step that changes nothing: the pipeline's denoiser sees exactly the latents it was given."""

    order, init_noise_sigma = 1, 1.0

    def __init__(self, config, timestep: int):
        self.config, self._timestep = config, timestep

    def set_timesteps(self, num_inference_steps=None, device=None, **_):
        self.timesteps = torch.tensor([self._timestep], device=device)

    def scale_model_input(self, sample, timestep=None):
        return sample

    def step(self, model_output, timestep, sample, return_dict=True, **_):
        return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)


@contextmanager
def _frozen(pipe, timestep):
    """The frozen scheduler and a silent progress bar, for one call."""
    scheduler, bar = pipe.scheduler, getattr(pipe, "_progress_bar_config", {})
    pipe.scheduler = FrozenScheduler(scheduler.config, timestep)
    pipe.set_progress_bar_config(**{**bar, "disable": True})
    try:
        yield
    finally:
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(**bar)


# ---- output ----------------------------------------------------------------------------------------------------------
def _result(scores, pictures, classes, rule) -> Segmentation:
    if not torch.isfinite(scores).all():
        raise ValueError("Expected finite attention, but the scores hold NaN or infinity: use float32 or bfloat16.")
    own, entities = scores[:, : len(classes)], scores[:, len(classes) :]
    maps = [
        _labels(own[i : i + 1], entities[i : i + 1], rule, picture.size[::-1]) for i, picture in enumerate(pictures)
    ]
    return Segmentation(own, maps, classes if rule is None else (*classes, "background"))


def _labels(own, entities, rule, size) -> Int[Tensor, "H W"]:
    """Argmax at the image's size, on the CPU: the scores are resized, never the labels."""
    own = resize(own, size)
    if rule is not None:
        if rule.entities:
            highest = resize(entities, size).amax(1, keepdim=True)
            score = highest + rule.offset if rule.threshold is None else highest.clamp(min=rule.threshold)
        else:
            score = torch.full_like(own[:, :1], rule.threshold)
        own = torch.cat([own, score], 1)
    return own.argmax(1)[0].cpu()
