"""Pictures and videos that tiny loops are shown, and a tiny encoder of pictures."""

import numpy as np
import transformers
from PIL import Image


HEIGHT, WIDTH = 64, 32


def picture(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Image.Image:
    """Random colours."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def video(frames: int, height: int = HEIGHT, width: int = WIDTH) -> list[Image.Image]:
    """Random colours, others in each frame."""
    return [picture(height, width, seed) for seed in range(frames)]


def clip_vision(encoder: type = transformers.CLIPVisionModel, width: int = 4) -> dict:
    """An encoder of 32-pixel pictures, 17 tokens, and its processor."""
    config = transformers.CLIPVisionConfig(
        hidden_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        intermediate_size=16,
        patch_size=8,
    )
    return {
        "image_encoder": encoder(config),
        "image_processor": transformers.CLIPImageProcessor(crop_size=32, size=32),
    }
