"""A real image as the latents that a denoiser sees: encoded, noised, and handed out step by step."""

import math
from collections.abc import Sequence
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, DDPMScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from goca_guidance.denoisers.base import Family


def latent_channels(vae) -> int:
    """Channels of the latents that a denoiser gets, patches of them included."""
    return (vae.config.get("latent_channels") or vae.config.get("z_dim")) * patchified(vae) ** 2


def patchified(vae) -> int:
    """Side of the patches of latent pixels that a denoiser gets as one: Flux.2 normalises them as a batch."""
    return 2 if getattr(vae, "bn", None) is not None else 1


def encode(
    pipe, pictures: Sequence[Image.Image], height: int, width: int, dtype: torch.dtype
) -> Float[Tensor, "b c H W"]:
    """Scaled latents, the mean of the posterior; every picture is squeezed to the same height and width."""
    pixels = pipe.image_processor.preprocess(list(pictures), height=height, width=width)
    vae, config, device = pipe.vae, pipe.vae.config, pipe._execution_device
    loaded = vae.dtype
    if upcast := loaded == torch.float16 and config.get("force_upcast", False):
        offloaded = any(hasattr(vae, hook) for hook in ("_hf_hook", "_diffusers_hook"))
        vae = (vae if offloaded else deepcopy(vae)).to(torch.float32)  # other threads may run the shared one
    try:
        latents = _posterior(vae, pixels.to(device, vae.dtype)).float()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"Expected an autoencoder of RGB pictures, but {type(vae).__name__} takes none of {height} x {width}: use another "
            "checkpoint or size."
        ) from error
    finally:
        if upcast:
            vae.to(loaded)
    if not torch.isfinite(latents).all():
        raise ValueError(
            f"Expected finite latents, but the autoencoder gave NaN or infinity in {loaded}: use it in float32."
        )
    return _scaled(vae, latents).to(dtype)


def _posterior(vae, pixels) -> Float[Tensor, "b c H W"]:
    """The mean of the posterior, or what a deterministic autoencoder (Sana's) gives; a picture is a video of one frame."""
    of_videos = vae.config.get("z_dim") is not None  # as those of Qwen-Image and Wan call their channels
    encoded = vae.encode(pixels[:, :, None] if of_videos else pixels)
    latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    return latents[:, :, 0] if of_videos else latents


def _scaled(vae, latents: Float[Tensor, "b c H W"]) -> Tensor:
    """Latents as the denoiser was trained on: by a mean and a deviation of each channel, or by a shift and a factor."""
    config = vae.config
    if patchified(vae) > 1:
        patches, norm = F.pixel_unshuffle(latents, patchified(vae)), vae.bn
        deviation = (norm.running_var.float() + config.batch_norm_eps).sqrt()
        return (patches - norm.running_mean.float().view(1, -1, 1, 1)) / deviation.view(1, -1, 1, 1)
    factor = config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        channels = [
            torch.tensor(config[name], dtype=torch.float32, device=latents.device)
            for name in ("latents_mean", "latents_std")
        ]
        mean, deviation = (values.view(1, -1, 1, 1) for values in channels)
        return (latents - mean) * factor / deviation
    return (latents - (config.get("shift_factor") or 0)) * factor


def noisy_latents(
    pipe, family: Family, latents, timesteps, num_noises, generator
) -> list[tuple[float, Float[Tensor, "b c H W"]]]:
    """Noise samples of the latents at each timestep, with the timestep as the denoiser is told it."""
    if generator is None:
        generator = [torch.Generator().manual_seed(0) for _ in latents]
    noise_at = partial(_flow_noise, _tokens(family, latents)) if _is_flow(pipe.scheduler) else _diffusion_noise
    found = []
    for t in timesteps:
        for _ in range(num_noises):
            noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
            found.append(noise_at(pipe, latents, noise, t))
    return found


def _is_flow(scheduler) -> bool:
    """Whether a scheduler is one of flow matching, by its name or by what it was told the model predicts."""
    name, config = type(scheduler).__name__, scheduler.config
    if "EDM" in name:
        raise ValueError(f"Expected a diffusion or flow-matching scheduler for segmentation, but got {name}.")
    predicts = config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas", False)
    return name.startswith("FlowMatch") or predicts


def _diffusion_noise(pipe, latents, noise, t):
    with torch.device("cpu"):
        noiser = DDPMScheduler.from_config(pipe.scheduler.config)
    return t, noiser.add_noise(latents, noise, torch.tensor([t], dtype=torch.long, device=latents.device))


def _tokens(family, latents) -> int:
    return math.prod(family.grid(family.preset.reference, tuple(latents.shape[-2:])))


def _flow_noise(tokens, pipe, latents, noise, t):
    """On the scheduler's own schedule, shifted for this many pixel tokens: (1 - s) x + s noise."""
    config = pipe.scheduler.config
    steps, shift = config.num_train_timesteps, config.get("shift") or config.get("flow_shift") or 1.0
    if config.get("use_dynamic_shifting"):
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        shift = math.exp(calculate_shift(tokens, *(config[name] for name in names)))
    sigma = shift * t / (steps + (shift - 1) * t)
    return sigma * steps, ((1 - sigma) * latents + sigma * noise).to(latents.dtype)


class HandingScheduler(SchedulerMixin, ConfigMixin):
    """A schedule whose steps hand out given latents: the denoiser sees exactly these, at these timesteps.

    Where none are given, the loop's own are left as they are.
    """

    order, init_noise_sigma = 1, 1.0

    def __init__(self, config, handed: Sequence[tuple[float, Tensor | None]]):
        self._internal_dict, self._handed = config, handed

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None):
        """The given timesteps, whatever is asked."""
        whole = all(isinstance(t, int) for t, _ in self._handed)
        kind = torch.int64 if whole else torch.float32
        self.timesteps = torch.tensor([t for t, _ in self._handed], dtype=kind, device=device)
        self._step = 0

    def set_begin_index(self, begin_index=0):
        """There is nothing to begin."""

    def scale_model_input(self, sample, timestep=None):
        """The latents are what the denoiser is to see."""
        return sample

    def step(self, model_output, timestep, sample, return_dict=True, **_):
        """The next latents; after the last ones, those again. PixArt-alpha takes the second field of a single step."""
        self._step += 1
        following = self._handed[min(self._step, len(self._handed) - 1)][1]
        following = sample if following is None else following
        return SchedulerOutput(prev_sample=following) if return_dict else (following, following)
