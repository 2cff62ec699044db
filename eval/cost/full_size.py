"""Full-size stock pipelines with random weights, for measuring speed, which does not depend on what a model learned.

Denoisers have the published sizes. There are no text encoders: prompts travel as random embeddings of the real shapes, and
words are named by position. The autoencoder is a stub, because calls return latents.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import diffusers
import torch

from goca_guidance import TINY_SD


PROMPT = "a photo of a cat and a potted plant and a bus on grass"
WORDS = {"cat": [2], "plant": [5], "bus": [8], "dog": [11], "grass": [14]}
PROMPT_TOKENS = 16  # the end token's included; the rest is padding, which attention masks hide
T5_WORDS = WORDS | {"</s>": [PROMPT_TOKENS - 1]}


@dataclass(frozen=True)
class Embedded:
    """The embedded model, with its own weights and text encoder."""

    size: int = 64
    words: dict[str, list[int]] | None = None  # read off the prompt

    def build(self, device: torch.device, dtype: torch.dtype) -> diffusers.DiffusionPipeline:
        return diffusers.StableDiffusionPipeline.from_pretrained(TINY_SD).to(device, dtype)

    def call(self, pipe, batch: int) -> dict:
        return {"prompt": [PROMPT] * batch, "guidance_scale": 5.0}


@dataclass(frozen=True)
class Architecture:
    """A stock pipeline class and the sizes of what it is made of.

    Args:
        size: native, in pixels.
        pipeline: the stock class.
        denoiser, part: makes it, and its name in the pipeline.
        scheduler: makes it.
        vae: latent channels, scale, shift.
        prompt: shapes of the embeddings and masks of one prompt, by argument.
        options: further arguments of a call.
        words: regions by token positions.
    """

    size: int
    pipeline: type[diffusers.DiffusionPipeline]
    denoiser: Callable[[], diffusers.ModelMixin]
    scheduler: Callable[[], diffusers.SchedulerMixin]
    vae: dict[str, float]
    prompt: dict[str, tuple[int, ...]]
    part: str = "transformer"
    options: dict = field(default_factory=lambda: {"guidance_scale": 5.0})
    words: dict[str, list[int]] = field(default_factory=lambda: WORDS)

    def build(self, device: torch.device, dtype: torch.dtype) -> diffusers.DiffusionPipeline:
        absent = dict.fromkeys(inspect.signature(self.pipeline).parameters)
        models = {self.part: self.denoiser, "vae": partial(_vae, **self.vae)}
        parts = {name: _random(model, device, dtype) for name, model in models.items()}
        return self.pipeline(**absent | parts | {"scheduler": self.scheduler()})

    def call(self, pipe, batch: int) -> dict:
        """Random embeddings of a prompt and a negative prompt, with what masks them."""
        generator, model, found = torch.Generator().manual_seed(0), getattr(pipe, self.part), {}
        for prefix, tokens in (("", PROMPT_TOKENS), ("negative_", 1)):
            for name, shape in self.prompt.items():
                if "mask" in name:
                    value = (torch.arange(*shape) < tokens).long().expand(batch, -1)
                else:
                    value = torch.randn(batch, *shape, generator=generator).to(model.dtype)
                found[prefix + name] = value.to(model.device)
        return {"negative_prompt": None, **found, **self.options}


def _random(create: Callable[[], torch.nn.Module], device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A model without ever a second copy of its weights: small normal ones, norms near one; none on "meta"."""
    with torch.device("meta"):
        model = create().eval().requires_grad_(False)
        torch.nn.Module.to(model, dtype)  # diffusers' own warns of modules to keep in float32, of which there are none
    if device.type == "meta":
        return model
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.normal_(float(tensor.ndim == 1 and name.endswith("weight")), 0.02, generator=generator)
    return model


def _vae(**config) -> diffusers.AutoencoderKL:
    """An autoencoder of factor 8, as small as may be."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        **config,
    )


_sd = partial(diffusers.UNet2DConditionModel, sample_size=64, cross_attention_dim=768)  # else the class's defaults
_sdxl = partial(
    diffusers.UNet2DConditionModel,
    sample_size=128, block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
    use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)  # fmt: skip
_pixart = partial(
    diffusers.PixArtTransformer2DModel,
    sample_size=128, patch_size=2, in_channels=4, out_channels=8, num_layers=28, num_attention_heads=16,
    attention_head_dim=72, cross_attention_dim=1152, caption_channels=4096, norm_type="ada_norm_single",
    interpolation_scale=2, use_additional_conditions=False,
)  # fmt: skip
_hunyuan = partial(
    diffusers.HunyuanDiT2DModel,
    sample_size=128, patch_size=2, in_channels=4, num_layers=40, num_attention_heads=16, attention_head_dim=88,
    hidden_size=1408, mlp_ratio=4.3637, cross_attention_dim=1024, cross_attention_dim_t5=2048,
    pooled_projection_dim=1024, use_style_cond_and_image_meta_size=False,
)  # fmt: skip
_sd3 = partial(
    diffusers.SD3Transformer2DModel,
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, num_attention_heads=24,
    attention_head_dim=64, caption_projection_dim=1536, joint_attention_dim=4096, pooled_projection_dim=2048,
    pos_embed_max_size=192,
)  # fmt: skip
_flux = partial(
    diffusers.FluxTransformer2DModel,
    patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, num_attention_heads=24, attention_head_dim=128,
    joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
)  # fmt: skip
_ddim = partial(diffusers.DDIMScheduler, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                steps_offset=1, clip_sample=False)  # fmt: skip
_flow = partial(diffusers.FlowMatchEulerDiscreteScheduler, shift=3.0)
_SD_VAE = {"latent_channels": 4, "scaling_factor": 0.18215}
_SDXL_VAE = {"latent_channels": 4, "scaling_factor": 0.13025}
_SD3_VAE = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
_FLUX_VAE = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
_SDXL_PROMPT = {"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,)}
_PIXART_PROMPT = {"prompt_embeds": (300, 4096), "prompt_attention_mask": (300,)}
_SD3_PROMPT = {"prompt_embeds": (77 + 256, 4096), "pooled_prompt_embeds": (2048,)}
_FLUX_PROMPT = {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)}
_HUNYUAN_PROMPT = {"prompt_embeds": (77, 1024), "prompt_attention_mask": (77,),
                   "prompt_embeds_2": (256, 2048), "prompt_attention_mask_2": (256,)}  # fmt: skip
_SIZE_AS_IS = {"guidance_scale": 5.0, "use_resolution_binning": False}
_FLUX = Architecture(1024, diffusers.FluxPipeline, _flux, partial(_flow, use_dynamic_shifting=True), _FLUX_VAE,
                     _FLUX_PROMPT, options={"guidance_scale": 3.5, "true_cfg_scale": 4.0}, words=T5_WORDS)  # fmt: skip
ARCHITECTURES: dict[str, Embedded | Architecture] = {
    "tiny-sd": Embedded(),
    "sd-1.5": Architecture(512, diffusers.StableDiffusionPipeline, _sd, _ddim, _SD_VAE,
                           {"prompt_embeds": (77, 768)}, "unet"),
    "sdxl": Architecture(1024, diffusers.StableDiffusionXLPipeline, _sdxl, _ddim, _SDXL_VAE, _SDXL_PROMPT, "unet"),
    "pixart-sigma": Architecture(1024, diffusers.PixArtSigmaPipeline, _pixart, diffusers.DPMSolverMultistepScheduler,
                                 _SDXL_VAE, _PIXART_PROMPT, options=_SIZE_AS_IS, words=T5_WORDS),
    "hunyuan": Architecture(1024, diffusers.HunyuanDiTPipeline, _hunyuan,
                            partial(diffusers.DDPMScheduler, prediction_type="v_prediction"),
                            _SDXL_VAE, _HUNYUAN_PROMPT, options=_SIZE_AS_IS),
    "sd3": Architecture(1024, diffusers.StableDiffusion3Pipeline, _sd3, _flow, _SD3_VAE, _SD3_PROMPT),
    "flux": _FLUX,
    "sd-1.5-quarter": Architecture(512, diffusers.StableDiffusionPipeline, partial(
                                       _sd, block_out_channels=(80, 160, 320, 320), norm_num_groups=16,
                                       cross_attention_dim=192), _ddim, _SD_VAE, {"prompt_embeds": (77, 192)}, "unet"),
    "flux-short": replace(_FLUX, denoiser=partial(_flux, num_layers=2, num_single_layers=4)),
}  # fmt: skip
"""By name. "flux-short" is not Flux: 2 + 4 blocks of its widths in place of 19 + 38, for a machine that cannot hold it;
"sd-1.5-quarter" has a quarter of Stable Diffusion 1.5's channels, for one that is to compile it in minutes."""


def build(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> diffusers.DiffusionPipeline:
    """The stock pipeline of `ARCHITECTURES[name]`; on "meta" it has shapes and no weights."""
    pipe = ARCHITECTURES[name].build(torch.device(device), dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(name: str, pipe: diffusers.DiffusionPipeline, size: int, batch: int, steps: int) -> dict:
    """Keyword arguments of a stock call for `batch` square images of `size` pixels: two predictions a step, latents out."""
    call = {"height": size, "width": size, "num_inference_steps": steps, "output_type": "latent"}
    return {**call, "generator": torch.Generator().manual_seed(0), **ARCHITECTURES[name].call(pipe, batch)}


def guided_arguments(name: str) -> dict:
    """What a guided call needs beside the stock arguments: the words' positions, where no prompt is read."""
    words = ARCHITECTURES[name].words
    return {} if words is None else {"region_tokens": words}
