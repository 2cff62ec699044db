"""Tiny Sana pipelines.

u + s (c - u), one batch, unconditional first. Self-attention (`attn1`) is linear and has no map; `attn2` reads the text, whose
valid tokens a mask tells: the start and the last `max_sequence_length` - 1 of what Gemma read behind a long instruction.
"""

from functools import partial

import diffusers

from tests.helpers.loops.pictures import picture
from tests.helpers.loops.texts_llm import WIDTH, gemma2
from tests.helpers.loops.tiny_loop import TinyLoop, seeded


TEXT = 24
SIZE = {
    "height": 64,
    "width": 32,
    "guidance_scale": 4.5,
    "max_sequence_length": TEXT,
    "use_resolution_binning": False,
    "complex_human_instruction": ["a photo of the", "User Prompt: "],
}
HEADS = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": WIDTH,
    "sample_size": 8,
}


def _sana(control: bool = False) -> dict:
    transformer = diffusers.SanaTransformer2DModel(in_channels=4, out_channels=4, num_layers=3, **HEADS)
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3,
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        encoder_qkv_multiscales=((),) * 3,
        decoder_qkv_multiscales=((),) * 3,
        encoder_layers_per_block=(1,) * 3,
        decoder_layers_per_block=(1,) * 3,
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = {"transformer": transformer, "vae": vae, "scheduler": scheduler, **gemma2(max_length=256)}
    if control:
        parts["controlnet"] = diffusers.SanaControlNetModel(in_channels=4, out_channels=4, num_layers=1, **HEADS)
    return parts


LOOPS = {
    "SanaPipeline": TinyLoop(partial(seeded, _sana), SIZE),
    "SanaControlNetPipeline": TinyLoop(
        partial(seeded, partial(_sana, control=True)), SIZE | {"control_image": picture()}
    ),
}
