"""Segmentation of real images: conditional forwards of the stock pipeline on a noised image (GoCA, section on setup)."""

import inspect
from collections.abc import Sequence
from numbers import Real

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor

from goca_guidance.config import Background, GoCAConfig
from goca_guidance.families import denoiser_of, family_of, readers_of
from goca_guidance.images import load_image
from goca_guidance.maps import resize
from goca_guidance.noising import HandingScheduler, encode, noisy_latents
from goca_guidance.observer import check_seen
from goca_guidance.records import Segmentation, TokenLayout
from goca_guidance.segmentor import GoCASegmentor
from goca_guidance.tokens import class_layout
from goca_guidance.watch import Watch


@torch.no_grad()
def segment(
    pipe: DiffusionPipeline,
    stock: type[DiffusionPipeline],
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
        pipe: the pipeline whose components are used; `stock` is the text-to-image class that runs them.
        images: an image or a list: PIL, path, or H W 3 array (uint8, or float in [0, 1]). Any size; every PIL mode of 8 or
            16 bits a channel is read as RGB, transparency over white.
        classes: names, of one word or more. Each pixel gets one of them (or the background).
        prompt: what the model reads, for all images or one for each; it must hold every class (and background) name. By
            default the names joined by commas. It is padded to the stock pipeline's default length.
        timestep: of the scheduler's training steps; None takes the preset's. Several are averaged. A flow-matching
            schedule is shifted for the image's size, as in generation.
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
    family = family_of(denoiser_of(pipe.components))
    timesteps = _timesteps(timestep, family.preset.timestep, pipe.scheduler.config.num_train_timesteps - 1)
    _check_checkpoint(pipe, family)
    dtype = family.denoiser.dtype if family.denoiser.dtype.itemsize > 1 else pipe.vae.dtype  # fp8 is for storage
    rows, columns = _size(pipe, family, height, width)
    latents = encode(pipe, pictures, rows, columns, dtype)
    if isinstance(generator, list) and len(generator) != len(pictures):
        raise ValueError(
            f"Expected one generator, or one for each of the {len(pictures)} images, but got {len(generator)}."
        )
    noisy = noisy_latents(pipe, latents, timesteps, num_noises, generator)
    scores = _Forwards(pipe, family, names, goca or GoCAConfig()).run(stock, prompts, noisy)
    return _result(scores, pictures, tuple(classes), rule)


# ---- input ---------------------------------------------------------------------------------------------------------
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
    chosen = [chosen] if isinstance(chosen, Real) else list(chosen)
    if not chosen or not all(t == int(t) and 0 <= t <= last for t in chosen):
        raise ValueError(f"Expected whole timesteps from 0 to {last}, but got {chosen}.")
    return [int(t) for t in chosen]


def _check_checkpoint(pipe, family):
    """Segmentation needs a plain text-to-image checkpoint; others generate, but ask for more than an image and words."""
    config = family.denoiser.config
    if (
        getattr(family.denoiser, "encoder_hid_proj", None) is not None
        and config.get("encoder_hid_dim_type") != "text_proj"
    ):
        raise ValueError("Expected no IP-Adapter for segmentation: call `pipe.unload_ip_adapter()` first.")
    if not any(module is not None for module, _ in readers_of(pipe, family)):
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
    size = tuple(own or side * pipe.vae_scale_factor for own, side in zip((height, width), native, strict=True))
    step = pipe.vae_scale_factor * family.patch
    if any(side % step for side in size):  # before any work is done
        raise ValueError(f"Expected height and width divisible by {step}, but got {size[0]} x {size[1]}.")
    return size


# ---- the forwards ----------------------------------------------------------------------------------------------------
class _Forwards(Watch):
    """One conditional forward for each noise sample, in one run of a stock pipeline; their mean scores.

    The pipeline is a fresh one on the same components: its scheduler hands out the samples, one a step, and nothing of the
    caller's pipeline is touched.
    """

    def __init__(self, pipe, family, names, goca):
        super().__init__(family, readers_of(pipe, family))
        self.pipe, self.names, self.goca = pipe, names, goca
        self.scores: list[Tensor] = []
        self.layout: TokenLayout | None = None

    def run(self, stock, prompts, noisy) -> Float[Tensor, "b k H W"]:
        """Mean scores of the noise samples: (timestep, latents b c H W) each."""
        height, width = noisy[0][1].shape[-2:]
        handed = [(t, self.family.pack(latents)) for t, latents in noisy]
        runner = _fresh(stock, self.pipe, HandingScheduler(self.pipe.scheduler.config, handed))
        off = {"guidance_scale": 1.0, "true_cfg_scale": 1.0, "pag_scale": 0.0, "use_resolution_binning": False}
        known = inspect.signature(stock.__call__).parameters
        with self.installed():
            runner(
                prompts,
                height=height * self.pipe.vae_scale_factor,
                width=width * self.pipe.vae_scale_factor,
                latents=handed[0][1],
                num_inference_steps=len(handed),
                output_type="latent",
                **{name: value for name, value in off.items() if name in known},
            )
            self._finish()
        self.pipe.maybe_free_model_hooks()
        return torch.stack(self.scores).mean(0)

    def open(self, call, device) -> None:
        self._finish()
        if self.layout is None:
            self.layout = class_layout(self.encoded(0), self.names).to(device)
        self.segmentor = GoCASegmentor(self.goca, self.family.preset, self.layout)
        self.observer.projected = self.segmentor.projected
        self.observer.seen.clear()

    def keep(self, record) -> None:
        self.segmentor.keep(record)

    def _finish(self):
        """Scores of the forward that just ended, if one did."""
        if self.segmentor is not None:
            check_seen(self.segmentor.layers, self.observer.seen)
            with torch.autocast(self.layout.groups.device.type, enabled=False):
                self.scores.append(self.segmentor.scores())
        self.segmentor = None


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
