"""Tiny loops of CogVideoX.

All mix `u + s (c - u)` of one batch, the unconditional half first; `use_dynamic_cfg` sets s anew at each step. Latents are
b F c H W, tokens are row-major over frames, rows and columns in patches of 1 x 2 x 2, or of 2 x 2 x 2 (CogVideoX 1.5). Joint
attention `attn1`: T5's tokens, padding with them and without a mask, then the video's. Pictures, videos and controls that
are given are further channels.
"""

from functools import partial
from typing import Any

import diffusers

from tests.helpers.families import MAX_TOKENS
from tests.helpers.loops.pictures import HEIGHT, WIDTH, picture, video
from tests.helpers.loops.texts_t5 import t5
from tests.helpers.loops.tiny_loop import TinyLoop, frames_first, seeded


FRAMES = 9  # three latent frames


def _vae() -> diffusers.AutoencoderKLCogVideoX:
    """Shrinks frames by 4 and pixels by 8."""
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )


def _cogvideo(in_channels: int = 4, **changes) -> dict[str, Any]:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=32,
        num_layers=2,
        sample_width=WIDTH // 8,
        sample_height=HEIGHT // 8,
        sample_frames=FRAMES,
        max_text_seq_length=MAX_TOKENS,
        **changes,
    )
    return {"transformer": transformer, "vae": _vae(), "scheduler": diffusers.CogVideoXDDIMScheduler(), **t5()}


_SMALL = {"height": HEIGHT, "width": WIDTH, "guidance_scale": 5.0, "max_sequence_length": MAX_TOKENS}
_CALL = _SMALL | {"num_frames": FRAMES}
_newer = partial(_cogvideo, patch_size_t=2, use_rotary_positional_embeddings=True)
_cog = partial(TinyLoop, packed=frames_first)
LOOPS = {
    "CogVideoXPipeline": _cog(partial(seeded, _cogvideo), _CALL),
    "CogVideoXImageToVideoPipeline": _cog(
        partial(seeded, partial(_cogvideo, 8)), _CALL | {"image": picture()}, batch=False
    ),
    "CogVideoXVideoToVideoPipeline": _cog(
        partial(seeded, _cogvideo), _SMALL | {"video": video(FRAMES), "strength": 0.5}, steps=4
    ),
    "CogVideoXFunControlPipeline": _cog(
        partial(seeded, partial(_cogvideo, 8)), _SMALL | {"control_video": video(FRAMES)}, batch=False
    ),
}
SECOND = {  # CogVideoX 1.5: two latent frames a token, and one more frame where their number is odd
    "CogVideoXPipeline": _cog(partial(seeded, _newer), _CALL | {"use_dynamic_cfg": True}),
}
