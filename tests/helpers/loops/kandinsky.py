"""Tiny Kandinsky 3 and 5 pipelines.

Kandinsky 3: (s + 1) c - s u, one batch, unconditional first; a U-Net whose attention is called neither `attn1` nor `attn2`.
Kandinsky 5: u + s (c - u), two calls, conditional first, with texts of their own lengths; cross-attention and self-attention
over frames.
"""

from functools import partial

import diffusers
import transformers

from tests.helpers.families import _clip, _t5, _vae
from tests.helpers.loops.pictures import picture
from tests.helpers.loops.texts_qwen import WIDTH, qwen2_5_vl, qwen2_5_vl_processor
from tests.helpers.loops.tiny_loop import TinyLoop, channels_last, seeded


TEXT = 128  # Kandinsky 3 pads to it


def _kandinsky3() -> dict:
    unet = diffusers.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=8,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(16, 32),
        cross_attention_dim=16,
        encoder_hid_dim=32,
    )
    movq = diffusers.VQModel(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        num_vq_embeddings=12,
        norm_num_groups=4,
        vq_embed_dim=4,
    )
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True)
    return {"unet": unet, "movq": movq, "scheduler": scheduler, **_t5(max_length=TEXT)}


def kandinsky5_transformer(blocks: int, edit: bool) -> diffusers.Kandinsky5Transformer3DModel:
    """`edit`: it gets given frames and a mask beside the latents."""
    return diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=32,
        time_dim=16,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=blocks,
        axes_dims=(2, 2, 4),
        visual_cond=edit,
    )


def _kandinsky5(edit: bool = False) -> dict:
    transformer = kandinsky5_transformer(3, edit)
    texts = {"text_encoder": qwen2_5_vl(), "tokenizer": qwen2_5_vl_processor()}
    texts |= _clip(transformers.CLIPTextModel, "_2", max_length=77)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    return {"transformer": transformer, "vae": _vae(levels=4), "scheduler": scheduler, **texts}


SIZE3 = {"height": 128, "width": 64, "guidance_scale": 3.0}
SIZE5 = {"height": 64, "width": 32, "guidance_scale": 3.5}
SIZES = {"resolutions": [(32, 64)]}  # the pipelines take a few large ones
LOOPS = {
    "Kandinsky3Pipeline": TinyLoop(partial(seeded, _kandinsky3), SIZE3, excess=1),
    "Kandinsky3Img2ImgPipeline": TinyLoop(
        partial(seeded, _kandinsky3),
        {"image": picture(128, 64), "strength": 0.5, "guidance_scale": 3.0},
        steps=4,
        excess=1,
    ),
    "Kandinsky5T2IPipeline": TinyLoop(partial(seeded, _kandinsky5), SIZE5, settings=SIZES, packed=channels_last),
    "Kandinsky5I2IPipeline": TinyLoop(
        partial(seeded, partial(_kandinsky5, edit=True)),
        SIZE5 | {"image": picture(64, 32)},
        settings=SIZES,
        batch=False,
        packed=channels_last,
    ),
}
