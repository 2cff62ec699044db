"""What generated pictures of scenes are worth: objects of the caption, the ground and its texture, distance from scenes."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from eval.common.intervals import resamples
from eval.generation.classifier import SHOWN, classes, classifier, named, pixels_of, reproduced, shares
from eval.generation.distances import KernelDistance
from eval.generation.networks import efficientnet_lite0
from eval.generation.textures import GroundTextures, ground_pixels
from eval.scenes.scene import GROUNDS, OBJECTS, Scene


BATCH = 128


class Judge:
    """The classifier of Scenes and EfficientNet-Lite0, which know scenes as a model's autoencoder shows them.

    Args:
        vae: the autoencoder.
        scenes: real ones, of one size.
        device: where it works.
    """

    def __init__(self, vae, scenes: Sequence[Scene], device: str):
        self.classifier, self.network = classifier(device), efficientnet_lite0("torchmetrics", torch.device(device))
        self.device, self.size = device, len(scenes[0].mask)
        pictures = reproduced(vae, pixels_of(scenes)) / 2 + 0.5
        ground = ground_pixels(classes(self.classifier, 2 * pictures - 1), self.size)
        self.textures = GroundTextures(pictures, ground, self._grounds(scenes))
        self.kernel = KernelDistance(self._features(pictures), device)

    def __call__(self, pictures: Float[Tensor, "n 3 H W"], scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
        """Of pictures in [0, 1] and the scenes whose captions they were drawn for, arrays [n]:

        `named` objects and how many of them are `shown`, `others` that are shown; whether the largest `ground` is the named
        one; the `texture`'s distance, NaN where too little ground is seen; the share of pixels of the scene's own class
        (`layout`). And `distance` [1 + resamples]: the kernel distance of all, then of each resample.
        """
        labels, there = classes(self.classifier, 2 * pictures - 1), named(scenes)
        found = shares(labels)
        objects = (found[:, : len(OBJECTS)] >= SHOWN).cpu().numpy()
        grounds = self._grounds(scenes)
        texture = self.textures.distance(pictures, ground_pixels(labels, self.size), grounds)
        masks = torch.from_numpy(np.stack([s.mask for s in scenes])).to(self.device)
        layout = F.interpolate(labels[:, None].float(), size=masks.shape[1:], mode="nearest")[:, 0] == masks
        times = np.vstack([np.ones(len(scenes)), resamples(len(scenes))])
        return {
            "named": there.sum(1),
            "shown": (objects & there).sum(1),
            "others": (objects & ~there).sum(1),
            "ground": (found[:, len(OBJECTS) :].argmax(1) == grounds).cpu().numpy(),
            "texture": texture.cpu().numpy(),
            "layout": layout.flatten(1).float().mean(1).cpu().numpy(),
            "distance": self.kernel(self._features(pictures), times),
        }

    def _grounds(self, scenes):
        return torch.tensor([GROUNDS.index(each.ground) for each in scenes], device=self.device)

    def _features(self, pictures) -> np.ndarray:
        rows = []
        with torch.no_grad():
            for part in pictures.split(BATCH):
                resized = F.interpolate(part, size=(224, 224), mode="bilinear", antialias=True)
                rows.append(self.network.encode((resized - 0.498) / 0.502, ()).float().cpu())
        return torch.cat(rows).numpy()
