"""A classifier of Scenes: which objects and which ground a picture holds.

A ResNet-18 that learns from scenes as the autoencoder reproduces them: the judge of generated images in `caption_accuracy`.
It is trained here on synthetic scenes: neither CLIP score nor a benchmark of the field.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.models import resnet18
from tqdm.auto import tqdm

from eval.common.files import intact, replacing
from eval.scenes.scene import CLASSES, OBJECTS, scene


@dataclass(frozen=True)
class ClassifierSettings:
    """How it is trained, and judged itself.

    Args:
        training_scenes: scenes of the training split.
        epochs: passes over them.
        test_scenes: scenes of the test split on which its own hits are reported.
    """

    training_scenes: int = 12_000
    epochs: int = 3
    test_scenes: int = 400


def presence(names) -> torch.Tensor:
    """Which classes are named, [24] of 0 and 1."""
    return torch.tensor([float(name in names) for name in CLASSES])


def reproduced(vae, scenes) -> torch.Tensor:
    """Scenes as the autoencoder shows them, [N 3 H W] in [-1, 1]: the pictures that the generator can make."""
    pixels = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1
    pixels = pixels.to(vae.device)
    with torch.no_grad():
        return torch.cat([vae.decode(vae.encode(x).latent_dist.mode()).sample for x in pixels.split(64)])


def classifier(vae, settings: ClassifierSettings, path: Path) -> torch.nn.Module:
    """A trained classifier, from disk if it was trained before."""
    model = intact(path, lambda file: network(vae, torch.load(file, map_location=vae.device)))
    if model is None:
        torch.manual_seed(0)
        model = network(vae)
        train(model, vae, settings)
        with replacing(path) as part:
            torch.save(model.state_dict(), part)
    return model.eval()


def network(vae, weights=None) -> torch.nn.Module:
    """The classifier on the autoencoder's device, of random weights or of those given."""
    model = resnet18(num_classes=len(CLASSES)).to(vae.device)
    if weights is not None:
        model.load_state_dict(weights)
    return model


def train(model, vae, settings: ClassifierSettings) -> None:
    """Random scenes, mirrored half of the time."""
    chunks = range(0, settings.training_scenes, 256)
    scenes = [[scene("train", i) for i in range(start, start + 256)] for start in tqdm(chunks, desc="drawing scenes")]
    images = torch.cat([reproduced(vae, chunk) for chunk in tqdm(scenes, desc="reproducing scenes")])
    truth = torch.stack([presence(s.names) for chunk in scenes for s in chunk]).to(images.device)
    steps = settings.epochs * len(images) // 64
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train()
    for _ in tqdm(range(steps), desc="training the classifier"):
        index = torch.randint(len(images), (64,))
        x = images[index].flip(-1) if torch.rand(()) < 0.5 else images[index]
        loss = F.binary_cross_entropy_with_logits(model(x), truth[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def shown(model, images: torch.Tensor) -> np.ndarray:
    """Which objects a batch of images shows, [b 16] bool: the classifier gives them more than one half."""
    with torch.no_grad():
        return (model(images)[:, : len(OBJECTS)] > 0).cpu().numpy()
