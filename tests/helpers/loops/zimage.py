"""Z-Image's pipelines, tiny.

All mix as `c + s (c - u)`, guided from s > 0, one product for each image. One call a step: lists of c 1 H W, the
conditional half first. Keys are pixels, padded to a multiple of 32 tokens, then text, padded alike; the refiners before
(`noise_refiner`, `context_refiner`) see one of the two. Omni: text and pictures' tokens first, as in the prompt, then the
target's, then what a vision encoder saw of the pictures.
"""

from functools import partial
from typing import Any

import diffusers
import transformers

from tests.helpers.loops.qwen import half_mask, picture
from tests.helpers.loops.texts_qwen import WIDTH, qwen3, qwen_tokenizer
from tests.helpers.loops.tiny_loop import TinyLoop, plain, seeded


CHANNELS = 4
_SIZES = {"dim": 32, "n_heads": 2, "n_kv_heads": 2, "n_refiner_layers": 1}
SIZE = {"height": 32, "width": 48}  # 8 x 12 tokens


def flow_vae(channels: int = CHANNELS, kind: type = diffusers.AutoencoderKL) -> diffusers.AutoencoderKL:
    """Shrinks pixels by 2."""
    return kind(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _parts(**changes) -> dict[str, Any]:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=CHANNELS,
        n_layers=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
        **_SIZES,
        **changes,
    )
    parts = {"transformer": transformer, "vae": flow_vae(), "text_encoder": qwen3(), "tokenizer": qwen_tokenizer()}
    return parts | {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}


def _controlled(channels: int = CHANNELS) -> dict[str, Any]:
    control = diffusers.ZImageControlNetModel(
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=channels,
        add_control_noise_refiner="control_noise_refiner",
        **_SIZES,
    )
    return _parts() | {"controlnet": control}


def _omni() -> dict[str, Any]:
    config = transformers.Siglip2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_patches=16,
        patch_size=4,
    )
    processor = transformers.Siglip2ImageProcessor(patch_size=4, max_num_patches=16)
    parts = _parts(siglip_feat_dim=WIDTH) | {"vae": flow_vae().bfloat16()}  # which the pipeline feeds nothing else
    return parts | {"siglip": transformers.Siglip2VisionModel(config), "siglip_processor": processor}


def _negated(u, c, s):
    return -plain(u, c, s).squeeze(2)


_LOOP = partial(TinyLoop, mixed=_negated, excess=1, conditional_first=True, packed=lambda maps: maps[:, :, None])
_CALL = SIZE | {"guidance_scale": 4.0, "max_sequence_length": 64}
_PICTURE, _MASK = picture(48, 32), half_mask(48, 32)
_HALF = {"strength": 0.5}  # two of four steps

LOOPS: dict[str, TinyLoop] = {
    "ZImagePipeline": _LOOP(partial(seeded, _parts), _CALL),
    "ZImageImg2ImgPipeline": _LOOP(partial(seeded, _parts), _CALL | _HALF | {"image": _PICTURE}, steps=4),
    "ZImageInpaintPipeline": _LOOP(
        partial(seeded, _parts), _CALL | _HALF | {"image": _PICTURE, "mask_image": _MASK}, steps=4
    ),
    "ZImageControlNetPipeline": _LOOP(partial(seeded, _controlled), _CALL | {"control_image": _PICTURE}),
    "ZImageControlNetInpaintPipeline": _LOOP(
        partial(seeded, partial(_controlled, 2 * CHANNELS + 1)),
        _CALL | {"control_image": _PICTURE, "image": _PICTURE, "mask_image": _MASK},
        batch=False,
    ),
    "ZImageOmniPipeline": _LOOP(partial(seeded, _omni), _CALL | {"image": [picture(64, 64)]}),
}
