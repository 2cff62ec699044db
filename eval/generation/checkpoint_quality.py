"""How well a model draws at a checkpoint: pictures for captions of Scenes under plain guidance, and what judges say of them.

Pictures are kept as soon as a batch is done: they can be drawn on one machine and judged on another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from eval.common.files import intact, replacing
from eval.common.intervals import interval, resamples
from eval.common.load import load_pipeline
from eval.common.processes import seed_of, slices
from eval.common.provenance import digest_of
from eval.generation.captions import scenes_captions
from eval.generation.classifier import classifier, shown
from eval.generation.metrics import accuracy, objects_named, tidy
from eval.scenes.models import MODELS, weights_of
from eval.scenes.scene import scene
from eval.training.data import learned_scene, pixels
from eval.training.specs import SPECS
from goca_guidance import GoCASCFGPipeline
from goca_guidance.stock import exact_arguments, guidance_arguments


BATCH = 25  # captions in a call
SIDE = 64  # pixels, as the judges know pictures
REAL = 1000  # validation scenes that the pictures are compared with
HELD_OUT = 256  # validation scenes of the loss
RUNS = Path("runs/proof/pictures")


@dataclass(frozen=True)
class Drawing:
    """Pictures of a model at a checkpoint, for the captions of the first test scenes.

    Args:
        model: a name of `eval.scenes.models.MODELS`.
        folder: of the weights.
        captions: so many.
        scale: of classifier-free guidance.
        steps: denoising steps.
    """

    model: str
    folder: Path
    captions: int = 50
    scale: float = 5.0
    steps: int = 15

    @property
    def batches(self) -> list[Mapping[str, str]]:
        """Captions by id."""
        captions = scenes_captions("test", self.captions)
        return [{name: captions[name] for name in names} for names in slices([*captions], BATCH)]

    def path(self, batch: Mapping[str, str]) -> Path:
        """Where the pictures of a batch are kept."""
        facts = {"captions": dict(batch), "weights": weights_of(self.folder), "model": self.model}
        return RUNS / f"{digest_of(**facts, scale=self.scale, steps=self.steps)}.npz"

    def kept(self, batch: Mapping[str, str]) -> np.ndarray | None:
        """Pictures [n H W 3] uint8 of a batch, if they were kept whole."""
        return intact(self.path(batch), _pictures)

    def pictures(self) -> list[Image.Image]:
        """All, at the judges' size; they were kept."""
        return [judged_size(picture) for batch in self.batches for picture in self.kept(batch)]


def generator_of(folder: Path, device: str | torch.device | None = None) -> GoCASCFGPipeline:
    """The model, ready to draw."""
    return load_pipeline(str(folder), device=device)


def draw(drawing: Drawing, pipe: GoCASCFGPipeline, batch: Mapping[str, str]) -> None:
    """Draw a batch under plain guidance, and keep it; the noise of an image depends on its id alone."""
    side, kind = MODELS[drawing.model].home, type(pipe)
    pixels = pipe(
        [*batch.values()],
        num_inference_steps=drawing.steps,
        height=side,
        width=side,
        generator=[torch.Generator().manual_seed(seed_of(0, name)) for name in batch],
        output_type="np",
        use_scfg=False,
        **guidance_arguments(kind, drawing.scale),
        **exact_arguments(kind),
        **MODELS[drawing.model].arguments,
    ).images
    with replacing(drawing.path(batch)) as part, part.open("wb") as file:
        np.savez_compressed(file, pictures=(np.asarray(pixels) * 255).round().astype(np.uint8))


def _pictures(path: Path) -> np.ndarray:
    with np.load(path) as file:
        return file["pictures"]


def judged_size(picture: np.ndarray) -> Image.Image:
    """A picture [H W 3] uint8 as the judges know it: pixels of a larger one are averaged."""
    return Image.fromarray(picture).resize((SIDE, SIDE), Image.BOX)


def held_out_loss(model: str, pipe: GoCASCFGPipeline) -> float:
    """The training's loss, no caption dropped, on validation scenes; times are spread evenly, the noise is fixed."""
    learner, device = SPECS[model].learner(), pipe.device
    for name, part in learner.named_children():
        part.load_state_dict(getattr(pipe, name).state_dict())
    learner.to(device).eval()
    side, found, generator = MODELS[model].home, [], torch.Generator().manual_seed(0)
    for numbers in slices(range(HELD_OUT), 64):
        images, captions = zip(*(learned_scene("validation", side, number) for number in numbers), strict=True)
        with torch.no_grad():
            encoded = pipe.vae.encode(pixels(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)).to(device))
            latents = encoded.latent_dist.mode() * pipe.vae.config.scaling_factor
            noise = torch.randn(latents.shape, generator=generator).to(device)
            draw = (torch.tensor(numbers) * 0.618034).frac().to(device)  # evenly, in any order of the scenes
            tokens = {name: each.to(device) for name, each in learner.tokenized(list(captions)).items()}
            found.append(learner(latents, noise, draw, tokens).cpu())
    return tidy(torch.cat(found).mean().item())


class Judges:
    """The classifier of Scenes and EfficientNet-Lite0: caption accuracy, and the kernel distance from scenes."""

    def __init__(self, state: PartialState):
        from eval.generation.networks import efficientnet_lite0

        self.device, self.classifier = state.device, classifier(state.device)
        self.network = efficientnet_lite0("clean", state.device)
        self.distance = cache(self._distance)  # from the scenes of a side

    def __call__(self, drawing: Drawing) -> dict[str, float]:
        """Numbers of a drawing whose pictures were kept; the distance with its 95 % interval, a bootstrap over captions."""
        pictures, one = drawing.pictures(), np.ones((1, drawing.captions))
        pixels = torch.stack([as_pixels(picture) for picture in pictures]).to(self.device) / 127.5 - 1
        named = np.array([objects_named(text) for batch in drawing.batches for text in batch.values()])
        (complete, _), (found, _) = accuracy(shown(self.classifier, pixels), named, one)
        draws = np.vstack([one, resamples(len(pictures))])
        distance, *others = self.distance(MODELS[drawing.model].home)(self._rows(pictures), draws)
        low, high = interval(distance, np.array(others))
        numbers = {"caption_accuracy": complete, "objects_shown": found}
        return {
            name: tidy(value)
            for name, value in {
                **numbers,
                "mmd_efficientnet_lite0": distance,
                "mmd_low": low,
                "mmd_high": high,
            }.items()
        }

    def _rows(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        with torch.no_grad():
            parts = (torch.stack([self.network.prepare(each) for each in part]) for part in slices(pictures, 50))
            return np.concatenate([self.network.encode(part.to(self.device), []).cpu().numpy() for part in parts])

    def _distance(self, side: int):
        from eval.generation.distances import KernelDistance

        return KernelDistance(self._rows([judged_size(scene("validation", n, side).image) for n in range(REAL)]))


def as_pixels(picture: Image.Image) -> torch.Tensor:
    """[3 H W], 0 to 255."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
