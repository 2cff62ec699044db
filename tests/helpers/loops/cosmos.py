"""Tiny loops of Cosmos 1, 2 and 2.5.

All mix `c + s (c - u)` of two calls, the conditional one first; c and u are samples without noise (1 and 2: the scheduler
or the loop makes them of the predictions) or velocities (2.5). Latents are b c F H W, tokens are row-major over frames, rows
and columns in patches of 1 x 2 x 2; `attn2` reads T5's tokens (2.5: all of Qwen2.5-VL's layers, side by side in channels,
template and padding with them). Frames that are given are in the latents, told by a mask that is a further channel. The
pipelines want a safety checker: one that finds all things safe stands in.
"""

from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.helpers.families import MAX_TOKENS
from tests.helpers.loops.pictures import HEIGHT, WIDTH, picture, video
from tests.helpers.loops.texts_qwen import LAYERS, qwen2_5_vl, qwen_tokenizer
from tests.helpers.loops.texts_qwen import WIDTH as TEXT
from tests.helpers.loops.texts_t5 import t5
from tests.helpers.loops.tiny_loop import TinyLoop, later_frames, seeded
from tests.helpers.loops.wan import vae


FRAMES = 9  # three latent frames
QWEN_TOKENS = 64
SIGMA_DATA = 0.5


class _Safe(torch.nn.Module):
    """Finds everything safe."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, video):
        return video


def _transformer(in_channels: int = 16, **changes) -> diffusers.CosmosTransformer3DModel:
    sizes: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "mlp_ratio": 2,
        "text_embed_dim": 32,
        "adaln_lora_dim": 4,
        "max_size": (4, 32, 32),
        "rope_scale": (2.0, 1.0, 1.0),
        "concat_padding_mask": True,
        "extra_pos_embed_type": "learnable",
    }
    return diffusers.CosmosTransformer3DModel(in_channels=in_channels, out_channels=16, **sizes | changes)


def _vae() -> diffusers.AutoencoderKLCosmos:
    """Shrinks frames by 4 and pixels by 8."""
    return diffusers.AutoencoderKLCosmos(
        latent_channels=16,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        patch_size=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )


def _first(in_channels: int = 16) -> dict[str, Any]:
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=SIGMA_DATA, num_train_timesteps=1000, prediction_type="epsilon"
    )
    parts = {"transformer": _transformer(in_channels), "vae": _vae(), "scheduler": scheduler}
    return {**parts, **t5(), "safety_checker": _Safe()}


def _second(in_channels: int = 16) -> dict[str, Any]:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    parts = {"transformer": _transformer(in_channels), "vae": vae(), "scheduler": scheduler}
    return {**parts, **t5(), "safety_checker": _Safe()}


_READ = {"use_crossattn_projection": True, "crossattn_proj_in_channels": LAYERS * TEXT}
_READ |= {"encoder_hidden_states_channels": 32}


def _predict(**changes) -> dict[str, Any]:
    sizes = _READ | {"max_size": (16, 16, 16), "extra_pos_embed_type": None} | changes
    scheduler = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    return {
        "transformer": _transformer(17, **sizes),
        "vae": vae(),
        "scheduler": scheduler,
        "text_encoder": qwen2_5_vl(),
        "tokenizer": qwen_tokenizer(),
        "safety_checker": _Safe(),
    }


def _transfer() -> dict[str, Any]:
    """Beside the text, tokens of a picture are read by a kernel call of their own, after the text's."""
    pictures = {"img_context_dim_in": 8, "img_context_dim_out": 32}
    controlnet = diffusers.CosmosControlNetModel(
        n_controlnet_blocks=2,
        in_channels=18,
        latent_channels=18,
        model_channels=32,
        num_attention_heads=2,
        attention_head_dim=16,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        patch_size=(1, 2, 2),
        max_size=(16, 16, 16),
        **_READ | pictures,
    )
    made = _predict(controlnet_block_every_n=1, img_context_num_tokens=4, **pictures)
    return made | {"controlnet": controlnet}


_SMALL = {"height": HEIGHT, "width": WIDTH, "guidance_scale": 4.0, "negative_prompt": ""}  # else a long one
_TOKENS = {"max_sequence_length": MAX_TOKENS}
_CALL = _SMALL | _TOKENS | {"num_frames": FRAMES}
_QWEN = _SMALL | {"num_frames": FRAMES, "max_sequence_length": QWEN_TOKENS}


def _edm(mixture: Tensor, sample: Tensor, timestep: Tensor, sigma: Tensor) -> Tensor:
    """The sample without noise that the scheduler makes of a prediction (EDM, Table 1); their mixture is that of mixtures."""
    norm = sigma.double() ** 2 + SIGMA_DATA**2
    return sample * SIGMA_DATA**2 / norm + mixture * sigma * SIGMA_DATA / norm.sqrt()


def _flow(mixture: Tensor, sample: Tensor, timestep: Tensor, sigma: Tensor) -> Tensor:
    """The loop makes samples without noise, mixes them, and gives their difference from the sample by sigma."""
    return (sample + mixture) / (sigma.double() + 1)


_loop = partial(TinyLoop, excess=1)
LOOPS = {
    "CosmosTextToWorldPipeline": _loop(partial(seeded, _first), _CALL, after=_edm),
    "CosmosVideoToWorldPipeline": _loop(
        partial(seeded, partial(_first, 17)), _CALL | {"image": picture()}, after=_edm, own=later_frames
    ),
    "Cosmos2TextToImagePipeline": _loop(partial(seeded, _second), _SMALL | _TOKENS, after=_flow, tolerance=2e-3),
    "Cosmos2VideoToWorldPipeline": _loop(
        partial(seeded, partial(_second, 17)),
        _CALL | {"image": picture()},
        after=_flow,
        own=later_frames,
        tolerance=2e-3,
    ),
    "Cosmos2_5_PredictBasePipeline": _loop(partial(seeded, _predict), _QWEN | {"image": picture()}, own=later_frames),
    "Cosmos2_5_TransferPipeline": _loop(
        partial(seeded, _transfer), _QWEN | {"controls": video(FRAMES), "num_frames_per_chunk": FRAMES}
    ),
}
