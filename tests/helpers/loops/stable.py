"""Tiny pipelines of the families in `tests.helpers.families` with all their tasks, and Stable Diffusion's other ones.

u + s (c - u): one batch, unconditional first; Flux.1 makes two calls, conditional first.
"""

from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

from tests.helpers.families import FAMILIES, MAX_TOKENS, SMALL_TEXT, _control_model
from tests.helpers.loops.pictures import picture
from tests.helpers.loops.tiny_loop import TinyLoop, as_is, in_patches, plain, seeded, without_variance
from tests.helpers.tiny import tiny_components


SIZE = {"height": 32, "width": 16}
PICTURE, MASK = picture(32, 16), picture(32, 16, seed=1).convert("L").point(lambda value: 255 * (value > 127))
HALF = {"strength": 0.5}
REPAINT = HALF | {"image": PICTURE, "mask_image": MASK}
CONTROL = {"control_image": PICTURE}
HUNYUAN = {"height": 128, "width": 64}  # its autoencoder shrinks by 8


# ---- components ------------------------------------------------------------------------------------------------------
def _family(name: str, **changes) -> dict:
    return FAMILIES[name].components() | changes


def _controlled(name: str) -> dict:
    return _family(name, controlnet=_control_model(name))


def _sd3_inpainting() -> dict:
    """Its control is the masked picture and the mask."""
    denoiser = FAMILIES["sd3"].components()["transformer"]
    control = diffusers.SD3ControlNetModel.from_transformer(denoiser, num_layers=1, num_extra_conditioning_channels=1)
    return _family("sd3", controlnet=control)


def _union() -> dict:
    """A ControlNet for six kinds of control, made as large as the U-Net."""
    parts = _family("sdxl")
    names = ("down_block_types", "block_out_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim")
    names += ("transformer_layers_per_block", "attention_head_dim", "use_linear_projection", "addition_embed_type")
    names += ("addition_time_embed_dim", "projection_class_embeddings_input_dim", "in_channels")
    channels = {"num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16}
    control = diffusers.ControlNetUnionModel(
        conditioning_embedding_out_channels=(8, 16),
        **{name: parts["unet"].config[name] for name in names} | channels,
    )
    return parts | {"controlnet": control}


def _adapted(name: str) -> dict:
    kind, factor = ("full_adapter_xl", 4) if name == "sdxl" else ("full_adapter", 2)
    adapter = diffusers.T2IAdapter(3, [16, 32], num_res_blocks=1, downscale_factor=factor, adapter_type=kind)
    return _family(name, adapter=adapter)


def _depth() -> dict:
    sizes = {k: v for k, v in SMALL_TEXT.items() if k != "num_hidden_layers"}
    config = transformers.DPTConfig(
        num_hidden_layers=4,
        image_size=32,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8,
        **sizes,
    )
    parts = {name: part for name, part in tiny_components(in_channels=5).items() if "safety" not in name}
    processor = transformers.DPTImageProcessor(size={"height": 32, "width": 32})
    return parts | {"depth_estimator": transformers.DPTForDepthEstimation(config), "feature_extractor": processor}


def _unclip(image: bool) -> dict:
    """The denoiser is shown an image's embedding: a picture's, or one that a prior makes of the prompt."""
    parts = tiny_components(class_embed_type="projection", projection_class_embeddings_input_dim=64)
    parts = {name: parts[name] for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")}
    noising = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    parts |= {"image_normalizer": StableUnCLIPImageNormalizer(32), "image_noising_scheduler": noising}
    if image:
        vision = transformers.CLIPVisionConfig(projection_dim=32, image_size=32, patch_size=8, **SMALL_TEXT)
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
        encoder = transformers.CLIPVisionModelWithProjection(vision)
        return parts | {"image_encoder": encoder, "feature_extractor": processor}
    config = transformers.CLIPTextConfig(**parts["text_encoder"].config.to_dict() | {"projection_dim": 32})
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=32, num_layers=1, num_embeddings=MAX_TOKENS
    )
    return parts | {
        "prior": prior,
        "prior_text_encoder": transformers.CLIPTextModelWithProjection(config),
        "prior_tokenizer": parts["tokenizer"],
        "prior_scheduler": diffusers.UnCLIPScheduler(
            prediction_type="sample", num_train_timesteps=1000, clip_sample_range=5.0
        ),
    }


def _upscale4() -> dict:
    """Its middle level attends to the text twice (`only_cross_attention`)."""
    parts = tiny_components(in_channels=7, num_class_embeds=100, only_cross_attention=(True, False))
    parts = {name: parts[name] for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")}
    return parts | {"low_res_scheduler": diffusers.DDPMScheduler(), "max_noise_level": 99}


def _upscale2() -> dict:
    """K-diffusion's blocks; the pooled text and the noise level are embedded with the time."""
    parts = tiny_components()
    unet = diffusers.UNet2DConditionModel(
        act_fn="gelu",
        attention_head_dim=8,
        block_out_channels=(32, 32, 64, 64),
        cross_attention_dim=32,
        down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        mid_block_type=None,
        up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
        in_channels=8,
        out_channels=5,
        layers_per_block=1,
        conv_in_kernel=1,
        conv_out_kernel=1,
        norm_num_groups=None,
        resnet_time_scale_shift="scale_shift",
        time_cond_proj_dim=160,
        time_embedding_type="fourier",
        timestep_post_act="gelu",
    )
    parts = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer")} | {"unet": unet}
    return parts | {"scheduler": diffusers.EulerDiscreteScheduler(prediction_type="sample")}


def _without_last(u: torch.Tensor, c: torch.Tensor, s: torch.Tensor | float) -> torch.Tensor:
    return plain(u[:, :-1], c[:, :-1], s)  # the last channel is a variance


def _denoised(mixture, sample, timestep, sigma):
    """Preconditioned as by Karras et al."""
    return sample / (sigma**2 + 1) + sigma / (sigma**2 + 1) ** 0.5 * mixture


# ---- loops -----------------------------------------------------------------------------------------------------------
def _loop(name: str, changes: dict | None = None, components=None, **fields) -> TinyLoop:
    size = HUNYUAN if name == "hunyuan" else SIZE
    make = components or partial(_family, name)
    mixed = without_variance if name.startswith(("pixart", "hunyuan")) else plain
    facts: dict[str, Any] = {"mixed": mixed, "packed": in_patches if name == "flux" else as_is}
    return TinyLoop(partial(seeded, make), FAMILIES[name].call | size | (changes or {}), **facts, **fields)


def _tasks(name: str, stock: str) -> dict[str, TinyLoop]:
    """Image to image and inpainting."""
    return {
        f"{stock}Img2ImgPipeline": _loop(name, HALF | {"image": PICTURE}, steps=4),
        f"{stock}InpaintPipeline": _loop(name, REPAINT, steps=4),
    }


def _controls(name: str, prefix: str) -> dict[str, TinyLoop]:
    """ControlNet with a text, a picture, a hole in it."""
    make = partial(_controlled, name)
    return {
        f"{prefix}Pipeline": _loop(name, {"image": PICTURE}, make),
        f"{prefix}Img2ImgPipeline": _loop(name, HALF | CONTROL | {"image": PICTURE}, make, steps=4),
        f"{prefix}InpaintPipeline": _loop(name, REPAINT | CONTROL, make, steps=4),
    }


MODE = CONTROL | {"control_mode": 1}
LOOPS = {family.stock.__name__: _loop(name) for name, family in FAMILIES.items()}
LOOPS |= _tasks("sd", "StableDiffusion") | _tasks("sdxl", "StableDiffusionXL")
LOOPS |= _tasks("sd3", "StableDiffusion3") | _tasks("flux", "Flux")
LOOPS |= _controls("sd", "StableDiffusionControlNet") | _controls("sdxl", "StableDiffusionXLControlNet")
LOOPS |= {
    "StableDiffusionXLControlNetUnionPipeline": _loop("sdxl", MODE, _union),
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": _loop(
        "sdxl", HALF | MODE | {"image": PICTURE}, _union, steps=4
    ),
    "StableDiffusionXLControlNetUnionInpaintPipeline": _loop("sdxl", REPAINT | MODE, _union, steps=4),
    "FluxControlNetPipeline": _loop("flux", CONTROL, partial(_controlled, "flux")),
    "StableDiffusion3ControlNetPipeline": _loop("sd3", CONTROL, partial(_controlled, "sd3")),
    "StableDiffusion3ControlNetInpaintingPipeline": _loop("sd3", CONTROL | {"control_mask": MASK}, _sd3_inpainting),
    "HunyuanDiTControlNetPipeline": _loop(
        "hunyuan", {"control_image": picture(128, 64)}, partial(_controlled, "hunyuan")
    ),
    "StableDiffusionAdapterPipeline": _loop("sd", {"image": PICTURE}, partial(_adapted, "sd"), batch=False),
    "StableDiffusionXLAdapterPipeline": _loop("sdxl", {"image": PICTURE}, partial(_adapted, "sdxl"), batch=False),
    "StableUnCLIPPipeline": _loop("sd", {"prior_num_inference_steps": 2}, partial(_unclip, image=False)),
    "StableUnCLIPImg2ImgPipeline": _loop("sd", {"image": PICTURE}, partial(_unclip, image=True)),
    "StableDiffusionDepth2ImgPipeline": TinyLoop(
        partial(seeded, _depth), HALF | {"image": PICTURE, "guidance_scale": 5.0}, steps=4
    ),
    "StableDiffusionUpscalePipeline": TinyLoop(
        partial(seeded, _upscale4), {"image": picture(16, 8), "guidance_scale": 5.0}, batch=False
    ),
    "StableDiffusionLatentUpscalePipeline": TinyLoop(
        partial(seeded, _upscale2),
        {"image": PICTURE, "guidance_scale": 5.0},
        batch=False,
        mixed=_without_last,
        after=_denoised,
    ),
}
