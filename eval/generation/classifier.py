"""A classifier of Scenes' pixels: which objects and which ground a picture shows, and where.

A small U-Net (the stock `UNet2DModel`, told timestep 0) that learned exact masks from scenes made blurred, noisy and pale at
random, as an autoencoder and a generator may show them: the judge of generated pictures, of any model of scenes. It was
trained on synthetic scenes (`eval.train_classifier`): neither CLIP score nor a benchmark of the field.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from eval.common.files import expecting, replacing
from eval.scenes.scene import CLASSES, COUNTS, OBJECTS, Scene, scene


WEIGHTS = Path(__file__).with_name("classifier.safetensors")
SIZE = 64  # of the pictures that it looks at; others are resized
SHOWN = 0.01  # share of a picture's pixels from which on an object is shown


@dataclass(frozen=True)
class ClassifierSettings:
    """How it is trained.

    Args:
        scenes: of the training split, of each level in turn.
        steps, batch: of the optimiser.
    """

    scenes: int = 15_000
    steps: int = 700
    batch: int = 32


class PixelClassifier(torch.nn.Module):
    """Pictures of `SIZE` x `SIZE` to a score of each class at every second pixel."""

    def __init__(self):
        super().__init__()
        self.unet = UNet2DModel(
            sample_size=SIZE // 2,
            in_channels=12,
            out_channels=len(CLASSES),
            block_out_channels=(24, 48, 96),
            down_block_types=("DownBlock2D",) * 3,
            up_block_types=("UpBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=8,
            add_attention=False,
        )

    def forward(self, images: Float[Tensor, "b 3 64 64"]) -> Float[Tensor, "b 24 32 32"]:
        return self.unet(F.pixel_unshuffle(images, 2), 0).sample


# ---- scenes ----------------------------------------------------------------------------------------------------------
def _drawn(split: str, size: int, place: tuple[int, str]) -> Scene:
    return scene(split, place[0], size, place[1])


def drawn(split: str, places: Sequence[tuple[int, str]], size: int = SIZE) -> list[Scene]:
    """Scenes of a split by number and level, drawn by all cores."""
    with ProcessPoolExecutor(mp_context=get_context("fork")) as processes:
        scenes = processes.map(partial(_drawn, split, size), places, chunksize=64)
        return list(tqdm(scenes, total=len(places), desc=f"drawing {split} scenes", leave=False))


def mixed(count: int) -> list[tuple[int, str]]:
    """Numbers of scenes, the levels in turn."""
    levels = [*COUNTS]
    return [(number, levels[number % len(levels)]) for number in range(count)]


def pixels_of(scenes: Sequence[Scene]) -> Float[Tensor, "n 3 H W"]:
    """The scenes' pictures, in [-1, 1]."""
    return torch.from_numpy(np.stack([each.image for each in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1


def masks_of(scenes: Sequence[Scene]) -> Int[Tensor, "n H W"]:
    """The class of every pixel."""
    return torch.from_numpy(np.stack([each.mask for each in scenes])).long()


def named(scenes: Sequence[Scene]) -> Bool[np.ndarray, "n 16"]:
    """Which objects they hold."""
    return np.array([[name in each.objects for name in OBJECTS] for each in scenes])


def reproduced(vae, images: Float[Tensor, "n 3 H W"], batch: int = 64) -> Float[Tensor, "n 3 H W"]:
    """Pictures as an autoencoder shows them, in [-1, 1]: the best that its generator can make."""
    with torch.no_grad():
        parts = images.to(vae.device).split(batch)
        return torch.cat([vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1) for x in parts])


# ---- training --------------------------------------------------------------------------------------------------------
def train(settings: ClassifierSettings, device: str) -> PixelClassifier:
    """Cross entropy of every pixel; scenes are mirrored half of the time."""
    torch.manual_seed(0)
    scenes = drawn("train", mixed(settings.scenes))
    images, masks = pixels_of(scenes).to(device), masks_of(scenes).to(device)
    model = PixelClassifier().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=settings.steps)
    bar = tqdm(range(settings.steps), desc="training the classifier")
    for step in bar:
        index = torch.randint(len(images), (settings.batch,))
        x, y = images[index.to(device)], masks[index.to(device)]
        if torch.rand(()) < 0.5:
            x, y = x.flip(-1), y.flip(-1)
        scores = F.interpolate(model(spoiled(x)), scale_factor=2, mode="bilinear")
        loss = F.cross_entropy(scores, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    return model.eval()


def spoiled(images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 3 H W"]:
    """Coarser, brighter or darker, tinted, and noisy, at random."""
    size, side = images.shape[-1], int(torch.randint(images.shape[-1] * 7 // 16, images.shape[-1] + 1, ()))
    coarse = F.interpolate(images, size=side, mode="bilinear", antialias=True)
    images = F.interpolate(coarse, size=size, mode="bicubic")
    by_image = partial(torch.rand, len(images), device=images.device)
    contrast, noise = 0.85 + 0.3 * by_image()[:, None, None, None], 0.1 * by_image()[:, None, None, None]
    tint = 0.2 * torch.rand(len(images), 3, 1, 1, device=images.device) - 0.1
    return images * contrast + tint + noise * torch.randn_like(images)


def write(model: PixelClassifier, path: Path = WEIGHTS) -> None:
    """Its weights, in half precision."""
    with replacing(path) as part:
        save_file({name: value.half().contiguous().cpu() for name, value in model.state_dict().items()}, part)


def classifier(device: str | torch.device, path: Path = WEIGHTS) -> PixelClassifier:
    """The trained classifier."""
    model = PixelClassifier()
    with expecting("the classifier's weights", path, "train it again by `python -m eval.train_classifier`"):
        model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.to(device).eval()


# ---- asking ----------------------------------------------------------------------------------------------------------
def classes(model: torch.nn.Module, images: Float[Tensor, "b 3 H W"], batch: int = 256) -> Int[Tensor, "b 32 32"]:
    """The class of every second pixel of pictures in [-1, 1], which are brought to the classifier's size."""
    with torch.no_grad():
        if images.shape[-2:] != (SIZE, SIZE):
            images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True)
        return torch.cat([model(part).argmax(1) for part in images.split(batch)])


def shares(labels: Int[Tensor, "b h w"]) -> Float[Tensor, "b 24"]:
    """Share of the pixels that each class has."""
    return F.one_hot(labels, len(CLASSES)).float().mean((1, 2))


def shown(model: torch.nn.Module, images: Float[Tensor, "b 3 H W"]) -> Bool[np.ndarray, "b 16"]:
    """Which objects pictures show: each is at least `SHOWN` of the pixels."""
    return (shares(classes(model, images))[:, : len(OBJECTS)] >= SHOWN).cpu().numpy()
