"""Tiny DeepFloyd IF pipelines: pixels instead of latents.

u + s (c - u), one batch, unconditional first; the mixture is of the first half of the output's channels, the variance is the
conditional prediction's. Text keys are added to self-attention (`add_k_proj`): pixels are queries, text and pixels keys, text
first, at the coarse levels of the U-Net.
"""

from functools import partial

import diffusers
import torch

from tests.helpers.families import _t5
from tests.helpers.loops.pictures import picture
from tests.helpers.loops.tiny_loop import TinyLoop, plain, seeded


TEXT = 77  # the pipelines pad to it whatever the tokenizer says
SAFETY = {"safety_checker": None, "feature_extractor": None, "watermarker": None, "requires_safety_checker": False}
GUIDED = {"guidance_scale": 4.0, "clean_caption": False, "output_type": "pt"}
WHOLE, SMALL = picture(32, 16), picture(16, 8)
MASK = picture(32, 16, seed=1).convert("L").point(lambda value: 255 * (value > 127))


def _with_variance(u: torch.Tensor, c: torch.Tensor, s: torch.Tensor | float) -> torch.Tensor:
    return torch.cat([plain(u[:, :3], c[:, :3], s), c[:, 3:]], 1)


def _unet(superresolution: bool) -> diffusers.UNet2DConditionModel:
    changes = {"in_channels": 3}
    if superresolution:
        changes = {"in_channels": 6, "class_embed_type": "timestep", "mid_block_scale_factor": 1.414}
        changes |= {"time_embedding_act_fn": "gelu"}
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        out_channels=6,
        cross_attention_dim=24,
        encoder_hid_dim=32,
        attention_head_dim=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        norm_num_groups=4,
        **changes,
    )


def _scheduler() -> diffusers.DDPMScheduler:
    return diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True)


def _stage1() -> dict:
    return {"unet": _unet(False), "scheduler": _scheduler(), **_t5(max_length=TEXT), **SAFETY}


def _stage2() -> dict:
    noising = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True)
    parts = {"unet": _unet(True), "scheduler": _scheduler(), "image_noising_scheduler": noising}
    return parts | _t5(max_length=TEXT) | SAFETY


STAGE1, STAGE2 = partial(seeded, _stage1), partial(seeded, _stage2)
HALF = GUIDED | {"strength": 0.5}
UPSCALED = {"image": SMALL, "noise_level": 20}
LOOPS = {
    "IFPipeline": TinyLoop(STAGE1, mixed=_with_variance, call=GUIDED | {"height": 32, "width": 16}),
    "IFImg2ImgPipeline": TinyLoop(STAGE1, mixed=_with_variance, call=HALF | {"image": WHOLE}, steps=4, batch=False),
    "IFInpaintingPipeline": TinyLoop(
        STAGE1, mixed=_with_variance, call=HALF | {"image": WHOLE, "mask_image": MASK}, steps=4, batch=False
    ),
    "IFSuperResolutionPipeline": TinyLoop(
        STAGE2, mixed=_with_variance, call=GUIDED | UPSCALED | {"height": 32, "width": 16}, batch=False
    ),
    "IFImg2ImgSuperResolutionPipeline": TinyLoop(
        STAGE2, mixed=_with_variance, call=HALF | UPSCALED | {"original_image": WHOLE}, steps=4, batch=False
    ),
    "IFInpaintingSuperResolutionPipeline": TinyLoop(
        STAGE2,
        mixed=_with_variance,
        call=HALF | UPSCALED | {"original_image": WHOLE, "mask_image": MASK},
        steps=4,
        batch=False,
    ),
}
