"""A tiny Stable Diffusion of the real component classes, random weights, 32-pixel images."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from eval.scenes.tokenizers import clip_tokenizer


WORDS = [
    "a",
    "an",
    "the",
    "of",
    "on",
    "and",
    "photo",
    "cat",
    "dog",
    "bus",
    "potted",
    "plant",
    "grass",
    "sky",
    "red",
    ",",
    ".",
]


def tiny_components(seed: int = 0, **unet_changes) -> dict:
    """Components for `StableDiffusionPipeline(**...)`; words outside WORDS become letters."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer(WORDS, max_length=24)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = {
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    vae = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 32,
    }
    return {
        "unet": UNet2DConditionModel(**{**unet, **unet_changes}).eval(),
        "vae": AutoencoderKL(**vae).eval(),
        "text_encoder": CLIPTextModel(text).eval(),
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def stock_of(pipe) -> StableDiffusionPipeline:
    """The stock pipeline on the same modules."""
    stock = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    return stock


def generate(pipe, prompt="a cat on grass", seed=0, **kwargs):
    """Three steps of a Stable Diffusion pipeline, each prompt with its own generator."""
    count = 1 if isinstance(prompt, str) or prompt is None else len(prompt)
    generator = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    arguments = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "pt", "generator": generator}
    return pipe(prompt, **{**arguments, **kwargs})
