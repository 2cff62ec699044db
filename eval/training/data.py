"""What the models learn from: scenes of all levels, drawn and encoded once."""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm.auto import tqdm

from eval.common.files import intact, replacing
from eval.common.provenance import weights_digest
from eval.scenes.scene import caption, scene
from eval.training.specs import FACTOR


CHUNK = 250  # scenes drawn at once
LEVELS = ("plain", "plain", "plain", "crowd", "lookalikes")  # of scene i: the i-th, in turns
GROUND_LEFT_OUT = 0.15  # share of captions that name the objects alone


def learned_scene(split: str, size: int, index: int) -> tuple[np.ndarray, str]:
    """Picture [size size 3] uint8 and caption of one scene."""
    drawn = scene(split, index, size, LEVELS[index % len(LEVELS)])
    rng = np.random.default_rng(index)
    if rng.random() < GROUND_LEFT_OUT:
        return drawn.image, caption(drawn.objects, None, rng)
    return drawn.image, drawn.caption


def drawn(split: str, size: int, count: int) -> Iterator[tuple[Tensor, list[str]]]:
    """The first scenes in chunks, by all cores: pictures [n 3 size size] uint8, and captions."""
    starts = range(0, count, CHUNK)
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(starts))) as pool:
        for part in tqdm(
            pool.map(partial(_chunk, split, size, count), starts),
            desc=f"{split} scenes of {size} px", total=len(starts), leave=False,
        ):  # fmt: skip
            images, captions = part
            yield torch.from_numpy(images).permute(0, 3, 1, 2), captions


def _chunk(split, size, count, start):
    found = [learned_scene(split, size, index) for index in range(start, min(start + CHUNK, count))]
    return np.stack([image for image, _ in found]), [text for _, text in found]


def pixels(images: Tensor) -> Tensor:
    """Of uint8 pictures, in [-1, 1]."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def pictures(run: Path, split: str, count: int) -> Tensor:
    """For the autoencoder, [count 3 64 64] uint8, drawn once: half of them whole, half quarters of scenes of 128 pixels."""
    path = run / f"pictures-{split}-{count}.pt"
    if (found := intact(path, torch.load)) is None:
        whole = torch.cat([images for images, _ in drawn(split, 64, count - count // 2)])
        large = [images.unfold(2, 64, 64).unfold(3, 64, 64) for images, _ in drawn(split, 128, -(-count // 8))]
        quarters = torch.cat(large).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        found = torch.cat([whole, quarters[: count // 2]])
        _keep(found, path)
    return found


def latents(run: Path, split: str, size: int, count: int, device: torch.device) -> tuple[Tensor, list[str]]:
    """Scaled latents [count 4 size/4 size/4] in half precision, and captions, of the first scenes; encoded once for each
    autoencoder."""
    weights = run / "vae" / "weights"
    path = run / f"latents-{split}-{size}-{count}-{weights_digest(str(weights))}.pt"
    if (found := intact(path, torch.load)) is None:
        vae = AutoencoderKL.from_pretrained(weights).to(device, memory_format=torch.channels_last)
        encoded, captions = [], []
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            for images, texts in drawn(split, size, count):
                mode = vae.encode(pixels(images).to(device)).latent_dist.mode().float()
                encoded.append((mode * vae.config.scaling_factor).half().cpu())
                captions += texts
        found = torch.cat(encoded), captions
        assert found[0].shape[-1] == size // FACTOR
        _keep(found, path)
    return found


def _keep(value, path):
    with replacing(path) as part:
        torch.save(value, part)
