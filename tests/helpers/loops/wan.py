"""Tiny loops of Wan 2.1 and 2.2 and their kin.

All mix `u + s (c - u)` of two calls, the conditional one first. Latents are b c F H W, tokens are row-major over
frames, rows and columns in patches of 1 x 2 x 2; `attn2` reads UMT5's tokens, zeros behind the text. Where a picture is given
(image to video), CLIP's tokens are read by a kernel call of their own, after the text's; its latents are further channels.
"""

from functools import partial
from typing import Any

import diffusers

from tests.helpers.families import MAX_TOKENS
from tests.helpers.loops.pictures import HEIGHT, WIDTH, clip_vision, picture, video
from tests.helpers.loops.texts_t5 import umt5
from tests.helpers.loops.tiny_loop import TinyLoop, seeded


FRAMES = 9  # three latent frames
SIZES: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}
PICTURE = {"image_dim": 4, "added_kv_proj_dim": 24}  # CLIP's tokens beside the text


def vae() -> diffusers.AutoencoderKLWan:
    """Shrinks frames by 4 and pixels by 8, to 16 channels."""
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def flow(**changes) -> diffusers.FlowMatchEulerDiscreteScheduler:
    """The scheduler of flow matching."""
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **changes)


def transformer(in_channels: int = 16, **changes) -> diffusers.WanTransformer3DModel:
    """Two blocks."""
    return diffusers.WanTransformer3DModel(in_channels=in_channels, out_channels=16, **SIZES | changes)


def _wan(**changes) -> dict[str, Any]:
    return {"transformer": transformer(**changes), "vae": vae(), "scheduler": flow(), **umt5()}


def _wan22(**changes) -> dict[str, Any]:
    """The first steps are the transformer's, those under the boundary its second one's."""
    return _wan(**changes) | {"transformer_2": transformer(**changes), "boundary_ratio": 0.875}


def _image_to_video() -> dict[str, Any]:
    return _wan(in_channels=36, **PICTURE) | clip_vision()


def _vace() -> dict[str, Any]:
    """Control blocks `vace_blocks` have attention of their own beside the first block's."""
    made = diffusers.WanVACETransformer3DModel(
        in_channels=16, out_channels=16, vace_layers=[0], vace_in_channels=96, **SIZES
    )
    return {"transformer": made, "vae": vae(), "scheduler": flow(), **umt5()}


def _animate() -> dict[str, Any]:
    """The first latent frame is the reference picture; faces are read by cross-attention of their own."""
    made = diffusers.WanAnimateTransformer3DModel(
        in_channels=36,
        latent_channels=16,
        out_channels=16,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
        **SIZES | PICTURE,
    )
    return {
        "transformer": made,
        "vae": vae(),
        "scheduler": diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        **umt5(),
        **clip_vision(),
    }


def _chrono_edit() -> dict[str, Any]:
    """Two latent frames are an edit, more are the way to it; positions of the last frame skip some."""
    made = diffusers.ChronoEditTransformer3DModel(in_channels=36, out_channels=16, **SIZES | PICTURE)
    return {"transformer": made, "vae": vae(), "scheduler": flow(), **umt5(), **clip_vision()}


_SMALL = {"height": HEIGHT, "width": WIDTH, "guidance_scale": 5.0}
_TOKENS = {"max_sequence_length": MAX_TOKENS}
_CALL = _SMALL | _TOKENS | {"num_frames": FRAMES}
_PICTURE = _SMALL | {"num_frames": FRAMES, "image": picture()}  # the transformer counts 512 tokens of text
LOOPS = {
    "WanPipeline": TinyLoop(partial(seeded, _wan), _CALL),
    "WanImageToVideoPipeline": TinyLoop(partial(seeded, _image_to_video), _PICTURE),
    "WanVideoToVideoPipeline": TinyLoop(
        partial(seeded, _wan), _SMALL | _TOKENS | {"video": video(FRAMES), "strength": 0.5}, steps=4
    ),
    "WanVACEPipeline": TinyLoop(
        partial(seeded, _vace), _CALL | {"video": video(FRAMES), "reference_images": [picture()]}, batch=False
    ),
    "WanAnimatePipeline": TinyLoop(
        partial(seeded, _animate),
        _SMALL
        | {"image": picture(), "pose_video": video(5), "face_video": video(5, 16, 16)}
        | {"segment_frame_length": 5, "prev_segment_conditioning_frames": 1},
    ),
    "LucyEditPipeline": TinyLoop(
        partial(seeded, partial(_wan, in_channels=32)), _CALL | {"video": video(FRAMES)}, batch=False
    ),
    "ChronoEditPipeline": TinyLoop(partial(seeded, _chrono_edit), _PICTURE),
}
SECOND = {  # with a second transformer, which serves the last steps
    "WanPipeline": TinyLoop(partial(seeded, _wan22), _CALL | {"guidance_scale_2": 3.0}, steps=3, guided=3),
    "WanImageToVideoPipeline": TinyLoop(
        partial(seeded, partial(_wan22, in_channels=36)),
        _PICTURE | {"guidance_scale_2": 3.0, "max_sequence_length": MAX_TOKENS},
        steps=3,
        guided=3,
    ),
}
