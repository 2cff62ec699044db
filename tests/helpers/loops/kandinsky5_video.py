"""Tiny loops of Kandinsky 5's videos.

Both mix `u + s (c - u)` of two calls, the conditional one first. Latents are b F H W c with the channels last, and beside
them those of given frames and a mask; tokens are row-major over frames, rows and columns in patches of 1 x 2 x 2.
`cross_attention` reads Qwen2.5-VL's tokens, its template cut, mixed by `text_transformer_blocks`; padding is not masked.
"""

from functools import partial
from typing import Any

import diffusers
import transformers

from tests.helpers.families import _clip
from tests.helpers.loops.hunyuan_video import vae
from tests.helpers.loops.kandinsky import kandinsky5_transformer
from tests.helpers.loops.pictures import HEIGHT, WIDTH, picture
from tests.helpers.loops.texts_qwen import qwen2_5_vl, qwen2_5_vl_processor
from tests.helpers.loops.tiny_loop import TinyLoop, channels_last, seeded


def _kandinsky() -> dict[str, Any]:
    return {
        "transformer": kandinsky5_transformer(2, edit=True),
        "vae": vae(),
        "text_encoder": qwen2_5_vl(),
        "tokenizer": qwen2_5_vl_processor(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        **_clip(transformers.CLIPTextModel, "_2", max_length=77),
    }


FRAMES = 21  # six latent frames: the first four are normalised by those that follow
_CALL: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "guidance_scale": 5.0, "negative_prompt": ""}
LOOPS = {
    "Kandinsky5T2VPipeline": TinyLoop(partial(seeded, _kandinsky), _CALL | {"num_frames": 9}, packed=channels_last),
    "Kandinsky5I2VPipeline": TinyLoop(
        partial(seeded, _kandinsky),
        _CALL | {"num_frames": FRAMES, "image": picture()},
        packed=channels_last,
        own=lambda latents: latents[:, 1:],  # the first is the picture
    ),
}
