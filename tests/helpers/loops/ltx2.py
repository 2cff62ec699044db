"""Tiny loops of LTX-2.

All mix `c + (s - 1) (c - u)` of one batch, the unconditional half first, in samples without noise that the loop makes of the
predictions; with `stg_scale` or `modality_scale` it adds differences to further predictions, each a forward of its own.
A prediction is the video's and the sound's. Latents are packed, b n c, as LTX-Video's; conditions stand behind the
video's own tokens. `attn2` reads the text, of which a transformer (`connectors`) made as many tokens: those of Gemma's layers
without the padding, mixed with one another, then registers.
"""

from functools import partial
from typing import Any

import diffusers
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from torch import Tensor

from tests.helpers.families import MAX_TOKENS
from tests.helpers.loops.pictures import HEIGHT, WIDTH, picture
from tests.helpers.loops.texts_llm import SMALL, gemma2
from tests.helpers.loops.texts_llm import WIDTH as TEXT
from tests.helpers.loops.tiny_loop import TinyLoop, in_tokens, seeded


FRAMES = 17  # three latent frames
_LAYERS = SMALL["num_hidden_layers"] + 1


def _vae() -> diffusers.AutoencoderKLLTX2Video:
    """Shrinks frames and pixels by 8."""
    return diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("LTX2VideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial", "temporal"),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=8,
    )


def _audio_vae() -> diffusers.AutoencoderKLLTX2Audio:
    return diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        mid_block_add_attention=False,
        sample_rate=16000,
        mel_hop_length=160,
        mel_bins=8,
    )


def _connectors() -> LTX2TextConnectors:
    return LTX2TextConnectors(
        caption_channels=TEXT,
        text_proj_in_factor=_LAYERS,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=4,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=4,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
    )


def _vocoder() -> LTX2Vocoder:
    return LTX2Vocoder(
        in_channels=4,
        hidden_channels=8,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )


def _ltx2() -> dict[str, Any]:
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        vae_scale_factors=(8, 8, 8),
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=TEXT,
        rope_double_precision=False,
        rope_type="split",
    )
    return {
        "transformer": transformer,
        "vae": _vae(),
        "audio_vae": _audio_vae(),
        "connectors": _connectors(),
        "vocoder": _vocoder(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        **gemma2(max_length=MAX_TOKENS),
    }


_CALL: dict[str, Any] = {
    "height": HEIGHT,
    "width": WIDTH,
    "num_frames": FRAMES,
    "frame_rate": 25.0,
    "guidance_scale": 5.0,
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "guidance_rescale": 0.0,
    "negative_prompt": "",
    "max_sequence_length": MAX_TOKENS,
}
_AUDIO = {
    "audio_guidance_scale": 1.0,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
    "audio_guidance_rescale": 0.0,
}
_PICTURE = [LTX2VideoCondition(picture(), crf=0)]  # other numbers want a video codec
_ltx2_parts = partial(seeded, _ltx2)


def _behind(tokens: Tensor) -> Tensor:
    """Behind the first frame, which is a picture."""
    return tokens[:, HEIGHT // 8 * WIDTH // 8 :]


def _later(tokens: Tensor) -> Tensor:
    """Frames behind the first: the loop unpacks them for its scheduler."""
    return tokens.unflatten(1, (3, HEIGHT // 8, WIDTH // 8)).movedim(-1, 1)[:, :, 1:]


_ltx2_loop = partial(TinyLoop, _ltx2_parts, packed=in_tokens)
LOOPS = {
    "LTX2Pipeline": _ltx2_loop(_CALL | _AUDIO),
    "LTX2ImageToVideoPipeline": _ltx2_loop(_CALL | _AUDIO | {"image": picture(), "image_crf": 0}, own=_later),
    "LTX2ConditionPipeline": _ltx2_loop(_CALL | _AUDIO | {"conditions": _PICTURE}, own=_behind),
    "LTX2HDRPipeline": _ltx2_loop(_CALL),
    "LTX2InContextPipeline": _ltx2_loop(_CALL | _AUDIO | {"conditions": _PICTURE}, own=_behind),
}
