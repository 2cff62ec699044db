"""Tiny loops of transformers that read a video and its text by layers of their own: Allegro, Latte, Sana Video.

All mix `u + s (c - u)` of one batch, the unconditional half first; latents are b c F H W. Allegro: tokens are row-major over
frames, rows and columns, T5's text with a mask. Latte: frames side by side in the batch, the text repeated for each of them
and cut where the prompt ends; `temporal_transformer_blocks` read one place in all frames; it predicts a variance too. Sana:
linear self-attention has no map; `attn2` reads Gemma's tokens, an instruction before them.
"""

from functools import partial
from typing import Any

import diffusers

from tests.helpers.families import MAX_TOKENS, _vae
from tests.helpers.loops.pictures import HEIGHT, WIDTH, picture
from tests.helpers.loops.texts_llm import gemma2
from tests.helpers.loops.texts_t5 import t5
from tests.helpers.loops.tiny_loop import TinyLoop, later_frames, seeded, without_variance
from tests.helpers.loops.wan import vae as wan_vae


FRAMES = 9


def _allegro() -> dict[str, Any]:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=WIDTH // 8,
        sample_height=HEIGHT // 8,
        sample_frames=3,
        caption_channels=32,
    )
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return {"transformer": transformer, "vae": vae, "scheduler": diffusers.DDIMScheduler(), **t5()}


def _latte() -> dict[str, Any]:
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=3,
    )
    return {"transformer": transformer, "vae": _vae(), "scheduler": diffusers.DDIMScheduler(), **t5(max_length=120)}


def _sana(scheduler) -> dict[str, Any]:
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=12,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=32,
        sample_size=8,
        rope_max_seq_len=32,
    )
    return {"transformer": transformer, "vae": wan_vae(), "scheduler": scheduler(), **gemma2(width=32)}


_flow = partial(diffusers.DPMSolverMultistepScheduler, use_flow_sigmas=True, prediction_type="flow_prediction")
_SMALL: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "guidance_scale": 5.0}
_SANA = _SMALL | {"frames": FRAMES, "use_resolution_binning": False, "max_sequence_length": MAX_TOKENS}
_SANA |= {"complex_human_instruction": ["a photo of", "the sky"]}
LOOPS = {
    "AllegroPipeline": TinyLoop(
        partial(seeded, _allegro),
        _SMALL | {"num_frames": FRAMES, "max_sequence_length": MAX_TOKENS, "clean_caption": False},
    ),
    "LattePipeline": TinyLoop(
        partial(seeded, _latte),
        {"height": 16, "width": 32, "video_length": 3, "clean_caption": False},
        mixed=without_variance,
    ),
    "SanaVideoPipeline": TinyLoop(partial(seeded, partial(_sana, _flow)), _SANA),
    "SanaImageToVideoPipeline": TinyLoop(
        partial(seeded, partial(_sana, diffusers.FlowMatchEulerDiscreteScheduler)),
        _SANA | {"image": picture()},
        own=later_frames,
    ),
}
