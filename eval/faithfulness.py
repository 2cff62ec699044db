"""How often a generated image shows what its caption names: `python -m eval.faithfulness`.

A ResNet-18 learns from scenes, as the autoencoder reproduces them, which objects and which ground a picture holds. It then
looks at images generated for the captions of held-out scenes, with the same seeds under CFG, S-CFG and GoCA + S-CFG. This
is a classifier trained here on synthetic scenes, not CLIP score and not a benchmark of the field. What the classifier
itself achieves on held-out scenes stands beside the result.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler
from torchvision.models import resnet18
from tqdm.auto import tqdm

from eval.common.files import replacing, write_json
from eval.common.load import load_pipeline
from eval.common.provenance import command, fingerprint, weights_digest
from eval.common.tables import markdown
from eval.generating import METHODS as GUIDANCE
from eval.scenes import CLASSES, OBJECTS, scene
from goca_guidance import TINY_SD


METHODS = {name: GUIDANCE[method] for name, method in (("CFG", "cfg"), ("S-CFG", "scfg"), ("GoCA + S-CFG", "goca"))}


@dataclass(frozen=True)
class Settings:
    """What the numbers depend on."""

    captions: int = 400
    steps: int = 25
    guidance_scale: float = 5.0
    batch: int = 20
    training_scenes: int = 12_000
    epochs: int = 3


# ---- the classifier --------------------------------------------------------------------------------------------------
def presence(names) -> torch.Tensor:
    """Which classes are named, [24] of 0 and 1."""
    return torch.tensor([float(name in names) for name in CLASSES])


def reproduced(vae, scenes) -> torch.Tensor:
    """Scenes as the autoencoder shows them, [N 3 H W] in [-1, 1]: the pictures that the generator can make."""
    pixels = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1
    pixels = pixels.to(vae.device)
    with torch.no_grad():
        return torch.cat([vae.decode(vae.encode(x).latent_dist.mode()).sample for x in pixels.split(64)])


def classifier(vae, settings: Settings, path: Path) -> torch.nn.Module:
    """A trained classifier, from disk if it was trained before."""
    torch.manual_seed(0)
    model = resnet18(num_classes=len(CLASSES)).to(vae.device)
    if not path.exists():
        train(model, vae, settings)
        with replacing(path) as part:
            torch.save(model.state_dict(), part)
    model.load_state_dict(torch.load(path, map_location=vae.device))
    return model.eval()


def train(model, vae, settings: Settings) -> None:
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


# ---- the measurement -------------------------------------------------------------------------------------------------
def shown(model, images: torch.Tensor) -> np.ndarray:
    """Which objects a batch of images shows, [b 16] bool: the classifier gives them more than one half."""
    with torch.no_grad():
        return (model(images)[:, : len(OBJECTS)] > 0).cpu().numpy()


def generate(pipe, first: int, settings, **arguments):
    """A batch's output for the captions of scenes from number `first`; a scene's number is its seed, whatever the method.

    `settings`: captions, batch, steps and guidance_scale. Images are in [0, 1], b 3 H W.
    """
    numbers = range(first, min(first + settings.batch, settings.captions))
    return pipe(
        [scene("test", i).caption for i in numbers],
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        generator=[torch.Generator().manual_seed(i) for i in numbers],
        **{"output_type": "pt", **arguments},
    )


def measure(pipe, model, settings: Settings, name: str, cache: Path) -> np.ndarray:
    """Which objects the image of each caption shows, [captions 16]."""
    path = cache / f"{name.replace(' ', '')}.npy"
    if not path.exists():
        found = []
        for first in tqdm(range(0, settings.captions, settings.batch), desc=name):
            found.append(shown(model, generate(pipe, first, settings, **METHODS[name]).images * 2 - 1))
        with replacing(path) as part, part.open("wb") as file:
            np.save(file, np.concatenate(found))
    return np.load(path)


def row(name: str, found: np.ndarray, named: np.ndarray, base: np.ndarray) -> dict:
    """Share of named objects that are shown, of images that show all, and of images that show one not named."""
    hits, extra = (found & named).sum(1), (found & ~named).any(1)
    complete, complete_base = hits == named.sum(1), (base & named).sum(1) == named.sum(1)
    gain = complete.astype(float) - complete_base
    half = 1.96 * gain.std(ddof=1) / len(gain) ** 0.5
    return {
        "method": name,
        "named objects shown": f"{100 * hits.sum() / named.sum():.1f} %",
        "images that show all": f"{100 * complete.mean():.1f} %",
        "images with another object": f"{100 * extra.mean():.1f} %",
        "difference, all shown": f"{100 * gain.mean():+.1f} ± {100 * half:.1f}",
    }


def run(settings: Settings, model_path: str) -> list[dict]:
    """A row for the scenes themselves, and one for each method."""
    pipe = load_pipeline(model_path)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    folder = Path("runs/faithfulness") / fingerprint(settings=asdict(settings), weights=weights_digest(model_path))
    model = classifier(pipe.vae, settings, folder / "classifier.pt")
    scenes = [scene("test", i) for i in range(settings.captions)]
    named = torch.stack([presence(s.objects) for s in scenes])[:, : len(OBJECTS)].bool().numpy()
    real = shown(model, reproduced(pipe.vae, scenes))
    found = {name: measure(pipe, model, settings, name, folder) for name in METHODS}
    base = found["CFG"]
    rows = [row("(the scenes themselves)", real, named, real)]
    return rows + [row(name, each, named, base) for name, each in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=Settings.captions)
    parser.add_argument("--guidance-scale", type=float, default=Settings.guidance_scale)
    parser.add_argument("--model", default=TINY_SD)
    parser.add_argument("--result", type=Path, default=Path("results/faithfulness-scenes.json"))
    args = parser.parse_args()
    settings = Settings(captions=args.captions, guidance_scale=args.guidance_scale)
    rows = run(settings, args.model)
    described = {**asdict(settings), "weights": weights_digest(args.model)}
    write_json(args.result, {"command": command(), "settings": described, "rows": rows})
    print(markdown(rows))


if __name__ == "__main__":
    main()
