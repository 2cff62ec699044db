"""How far a picture's ground is in its texture from that of scenes on the same ground. A distance of ours.

A ground is described by eight statistics of its pixels: mean and deviation of each colour, and the mean absolute difference of
neighbours in brightness, across and down (statistics of pixels and of a filter's answers, as Heeger and Bergen match them to
make textures, SIGGRAPH 1995; theirs are whole histograms). A statistic's distance is in deviations of it among scenes of the
same ground; the picture's is their root mean square: about one for a scene, larger for another colour, contrast or grain.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from eval.scenes.scene import GROUNDS, OBJECTS


LEAST = 0.02  # share of the pixels below which a ground has no texture
BRIGHTNESS = (0.299, 0.587, 0.114)


def ground_pixels(labels: Int[Tensor, "n h w"], size: int) -> Bool[Tensor, "n H W"]:
    """Pixels whose class is a ground, as are all their neighbours'; at the picture's size."""
    objects = (labels < len(OBJECTS)).float()[:, None]
    near = F.max_pool2d(objects, 3, stride=1, padding=1)
    return F.interpolate(near, size=(size, size), mode="nearest")[:, 0] == 0


def statistics(pictures: Float[Tensor, "n 3 H W"], ground: Bool[Tensor, "n H W"]) -> Float[Tensor, "n 8"]:
    """Of the pixels that are ground; NaN where fewer than `LEAST` of the picture are."""
    weights = ground[:, None].float()
    mean = _mean(pictures, weights)
    deviation = _mean((pictures - mean[..., None, None]) ** 2, weights).sqrt()
    light = (pictures * pictures.new_tensor(BRIGHTNESS)[:, None, None]).sum(1, keepdim=True)
    across = _mean(light.diff(dim=3).abs(), weights[..., 1:] * weights[..., :-1])
    down = _mean(light.diff(dim=2).abs(), weights[..., 1:, :] * weights[..., :-1, :])
    found = torch.cat([mean, deviation, across, down], 1)
    return torch.where(ground.flatten(1).float().mean(1)[:, None] >= LEAST, found, torch.nan)


def _mean(values, weights) -> Float[Tensor, "n c"]:
    return (values * weights).flatten(2).sum(2) / weights.flatten(2).sum(2).clamp(min=1)


class GroundTextures:
    """The textures of real scenes: `pictures` with their `ground` pixels, and the `names` of their grounds by index."""

    def __init__(self, pictures: Float[Tensor, "n 3 H W"], ground: Bool[Tensor, "n H W"], names: Int[Tensor, " n"]):
        found, self.mean, self.deviation = statistics(pictures, ground), [], []
        whole = ~found.isnan().any(1)
        for index, name in enumerate(GROUNDS):
            rows = found[(names == index) & whole]
            if len(rows) < 2:
                raise ValueError(f"Expected at least two scenes on {name} to know its texture, but got {len(rows)}.")
            self.mean.append(rows.mean(0))
            self.deviation.append(rows.std(0))

    def distance(
        self, pictures: Float[Tensor, "n 3 H W"], ground: Bool[Tensor, "n H W"], names: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """From scenes on the grounds that are named; NaN where a picture shows too little ground."""
        mean, deviation = torch.stack(self.mean)[names], torch.stack(self.deviation)[names]
        return (((statistics(pictures, ground) - mean) / deviation) ** 2).mean(1).sqrt()
