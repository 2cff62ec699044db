"""Tiny loops of LTX-Video.

All mix `u + s (c - u)` of one batch, the unconditional half first. Latents are packed, b n c: row-major over frames, rows
and columns, whose numbers are arguments of the denoiser (`num_frames`, `height`, `width`), or else are told by
`video_coords` (b 3 n). `attn2` reads T5's tokens with a mask. A conditioning frame at the start is in the latents; conditions
at later frames stand in the sequence before the video's own tokens (LTXCondition). LTXI2VLongMultiPrompt makes windows of
frames with a prompt each, and a frame of a negative index stands behind a window's own.
"""

from functools import partial
from typing import Any

import diffusers
from torch import Tensor

from tests.helpers.families import MAX_TOKENS
from tests.helpers.loops.pictures import HEIGHT, WIDTH, picture
from tests.helpers.loops.texts_t5 import t5
from tests.helpers.loops.tiny_loop import TinyLoop, in_tokens, negated, seeded


FRAMES = 17  # three latent frames


def _vae() -> diffusers.AutoencoderKLLTXVideo:
    """Shrinks frames and pixels by 8."""
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
        patch_size=1,
        patch_size_t=1,
    )


def _ltx(shifted: bool = True) -> dict[str, Any]:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=shifted)
    return {"transformer": transformer, "vae": _vae(), "scheduler": scheduler, **t5()}


_CALL = {
    "height": HEIGHT,
    "width": WIDTH,
    "num_frames": FRAMES,
    "guidance_scale": 5.0,
    "max_sequence_length": MAX_TOKENS,
}
_flat = partial(seeded, partial(_ltx, shifted=False))


def _later(tokens: Tensor) -> Tensor:
    """Frames behind the first, which is a picture: the loop unpacks them for its scheduler."""
    return tokens.unflatten(1, (3, HEIGHT // 8, WIDTH // 8)).movedim(-1, 1)[:, :, 1:]


_ltx_loop = partial(TinyLoop, packed=in_tokens)
LOOPS = {
    "LTXPipeline": _ltx_loop(partial(seeded, _ltx), _CALL),
    "LTXImageToVideoPipeline": _ltx_loop(partial(seeded, _ltx), _CALL | {"image": picture()}, own=_later),
    "LTXConditionPipeline": _ltx_loop(_flat, _CALL | {"image": picture()}, mixed=negated, target_last=True),
    "LTXI2VLongMultiPromptPipeline": _ltx_loop(
        _flat, _CALL | {"cond_image": picture(), "seed": None}, steps=3, batch=False
    ),
}
