"""Tiny loops of HunyuanVideo 1.0, its image-to-video kin, FramePack and HunyuanVideo 1.5.

All mix `u + s (c - u)` of two calls, the conditional one first; s is `true_cfg_scale` and wants a negative prompt
(`guidance_scale` is told to the transformer), or a guider's (1.5). Latents are b c F H W, tokens are row-major over frames,
rows and columns in patches of 1 x 2 x 2. Joint attention, two streams and then one: the video's tokens, then the text's, which
a refiner has mixed; Llama's template is cut by `crop_start`, padding stays behind and is masked.

Image to video puts tokens of the picture before the prompt's (LLaVA reads both); FramePack puts those of SigLIP there, and
frames of the past before the video's own tokens. 1.5 sorts its text, image by image: valid tokens of the picture, of ByT5
(what stands in quotes) and of Qwen2.5-VL, then the padding of each.
"""

from functools import partial
from typing import Any

import diffusers
import transformers

from tests.helpers.families import MAX_TOKENS, _clip
from tests.helpers.loops.pictures import HEIGHT, WIDTH, picture
from tests.helpers.loops.texts_qwen import WIDTH as TEXT
from tests.helpers.loops.texts_qwen import byte_level_tokenizer, qwen2_5_vl, qwen_tokenizer
from tests.helpers.loops.tiny_loop import TinyLoop, seeded


FRAMES = 9  # three latent frames
PICTURE_TOKENS = 16
_SPECIAL = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<image>", "<pad>"]
_VISION = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION |= {"image_size": 32, "patch_size": 8}
_LLAMA = {"hidden_size": TEXT, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}


# ---- texts -----------------------------------------------------------------------------------------------------------
def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Llama 3's signs; pads right."""
    return byte_level_tokenizer(
        _SPECIAL, bos_token=_SPECIAL[0], eos_token=_SPECIAL[1], pad_token=_SPECIAL[5], padding_side="right"
    )


def _turn(role: str, content: str, end: str = "<|eot_id|>") -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}{end}"


def _template(content: str, behind: str = "") -> dict[str, Any]:
    """What the pipeline writes around the prompt, and how many tokens of it, counted as its own are, it cuts."""
    before = _SPECIAL[0] + _turn("system", content) + _turn("user", "", end="")
    template = before + "{}<|eot_id|>" + behind
    return {"template": template, "crop_start": len(_tokenizer()(before).input_ids)}


def _llama_config() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(vocab_size=len(_tokenizer()), num_key_value_heads=1, pad_token_id=5, **_LLAMA)


def _llama() -> dict[str, Any]:
    texts = {"text_encoder": transformers.LlamaModel(_llama_config()), "tokenizer": _tokenizer()}
    return texts | _clip(transformers.CLIPTextModel, "_2", max_length=77)


def _llava() -> dict[str, Any]:
    vision = transformers.CLIPVisionConfig(**_VISION, projection_dim=8)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=_llama_config(),
        image_token_index=_SPECIAL.index("<image>"),
        pad_token_id=5,
    )
    texts = {"text_encoder": transformers.LlavaForConditionalGeneration(config), "tokenizer": _tokenizer()}
    processor = transformers.CLIPImageProcessor(crop_size=32, size=32)
    return texts | _clip(transformers.CLIPTextModel, "_2", max_length=77) | {"image_processor": processor}


# ---- pipelines -------------------------------------------------------------------------------------------------------
SIZES: dict[str, Any] = {
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "text_embed_dim": TEXT,
    "pooled_projection_dim": 32,
    "rope_axes_dim": (2, 4, 4),
}


def vae() -> diffusers.AutoencoderKLHunyuanVideo:
    """Shrinks frames by 4 and pixels by 8."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )


def _hunyuan(texts=_llama, in_channels: int = 4, **changes) -> dict[str, Any]:
    transformer = diffusers.HunyuanVideoTransformer3DModel(in_channels=in_channels, **SIZES | changes)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return {"transformer": transformer, "vae": vae(), "scheduler": scheduler, **texts()}


def _framepack() -> dict[str, Any]:
    transformer = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True, **SIZES
    )
    return {
        "transformer": transformer,
        "vae": vae(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        **_llama(),
        "image_encoder": transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**_VISION)),
        "feature_extractor": transformers.SiglipImageProcessor(size={"height": 32, "width": 32}),
    }


def _hunyuan15(task: str) -> dict[str, Any]:
    """Its Qwen2.5-VL is the text model alone; ByT5 has a byte a token."""
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=TEXT,
        text_embed_2_dim=8,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=64,
        task_type=task,
    )
    autoencoder = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )
    sizes = {"d_model": 8, "d_ff": 16, "d_kv": 4, "num_heads": 2, "num_layers": 1}
    return {
        "transformer": transformer,
        "vae": autoencoder,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder": qwen2_5_vl().model.language_model,
        "tokenizer": qwen_tokenizer(),
        "text_encoder_2": transformers.T5EncoderModel(transformers.T5Config(vocab_size=384, **sizes)),
        "tokenizer_2": transformers.ByT5Tokenizer(),
        "guider": diffusers.ClassifierFreeGuidance(guidance_scale=5.0),
    }


_SMALL: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
_CFG = {"true_cfg_scale": 5.0, "guidance_scale": 1.0, "negative_prompt": "", "max_sequence_length": MAX_TOKENS}
_CALL = _SMALL | _CFG | {"prompt_template": _template("Describe the image")}
_LLAVA_TEMPLATE = _template("<image>\nDescribe the image", _turn("assistant", "", end="")) | {
    "image_emb_start": 5,
    "image_emb_end": 5 + PICTURE_TOKENS,
    "image_emb_len": PICTURE_TOKENS,
}
LOOPS = {
    "HunyuanVideoPipeline": TinyLoop(partial(seeded, _hunyuan), _CALL),
    "HunyuanVideoImageToVideoPipeline": TinyLoop(
        partial(seeded, partial(_hunyuan, _llava, 9, image_condition_type="latent_concat", guidance_embeds=False)),
        _SMALL | _CFG | {"image": picture(), "prompt_template": _LLAVA_TEMPLATE},
        batch=False,
    ),
    "HunyuanSkyreelsImageToVideoPipeline": TinyLoop(
        partial(seeded, partial(_hunyuan, in_channels=8)), _CALL | {"image": picture()}, batch=False
    ),
    "HunyuanVideoFramepackPipeline": TinyLoop(
        partial(seeded, _framepack), _CALL | {"image": picture(), "latent_window_size": 3}, batch=False
    ),
    "HunyuanVideo15Pipeline": TinyLoop(
        partial(seeded, partial(_hunyuan15, "t2v")),
        _SMALL,
        settings={"tokenizer_max_length": 200, "tokenizer_2_max_length": 32, "vision_num_semantic_tokens": 16},
    ),
}
