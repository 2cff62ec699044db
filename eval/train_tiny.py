"""Train the tiny models on synthetic scenes, from the stock component classes.

    python -m eval.train_tiny vae            # AutoencoderKL, 64 px to 16 x 16 x 4, which the others share
    python -m eval.train_tiny tiny-unet      # U-Net, CLIP
    python -m eval.train_tiny tiny-pixart    # DiT, T5
    python -m eval.train_tiny tiny-flux      # MMDiT, T5 and CLIP, flow matching
    python -m eval.train_tiny tiny-unet --ship  # the finished weights to where they are used from, with samples

Each goes on from its last checkpoint when it is started again, bit for bit: what a step draws depends on the seed and the
step's number alone. After 10, 25, 50 and 100 per cent of the steps the averaged weights are kept as a folder that the model's
stock pipeline loads, checkpoints/MODEL/PERCENT beside --run; another round begins with such a folder (--begin). A GPU is used
where there is one.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor

from eval.common.files import recovered, replacing, writable
from eval.common.programs import at_least, command_line
from eval.common.programs import run as run_program
from eval.scenes.scene import scene
from eval.training.data import latents, pictures, pixels
from eval.training.specs import SPECS, Learner, Spec, autoencoder
from eval.training.stage import Stage


CAPTION_DROPOUT = 0.1  # fraction of samples that train the unconditional branch
VAE = {"steps": 3600, "batch": 64, "learning_rate": 1e-3}
LEARNING_RATE = 1.5e-3
HELD_OUT = 512  # validation scenes, or as many as are learned from


# ---- the autoencoder -------------------------------------------------------------------------------------------------
class Autoencoding(torch.nn.Module):
    """An autoencoder as one forward: pixels and posterior noise to the reconstruction and the KL of the posterior."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, images, noise):
        posterior = self.vae.encode(images).latent_dist
        return self.vae.decode(posterior.mean + posterior.std * noise).sample, posterior.kl()


def train_vae(args) -> None:
    """L1 on pixels and on their differences (edges), and the usual small KL."""
    set_seed(args.seed)
    model = Autoencoding(autoencoder()).to(memory_format=torch.channels_last)
    stage = Stage(args.run / "vae", model, settings_of(args, VAE), args.every, keep=lambda model, share: None)
    images = pictures(args.run, "train", args.scenes).to(stage.device)
    held_out = pixels(pictures(args.run, "validation", min(HELD_OUT, args.scenes)).to(stage.device))

    def batch(step):
        generator = stage.generator(step)
        chosen = torch.randint(len(images), (args.batch,), generator=generator, device=stage.device)
        noise = torch.randn(args.batch, 4, 16, 16, generator=generator, device=stage.device)
        return pixels(images[chosen]), noise

    autoencode = stage.graphed(*batch(0))

    def loss_of(step):
        x, noise = batch(step)
        output, kl = autoencode(x, noise)
        return reconstruction(output, x) + 1e-6 * kl.mean()

    stage.train(loss_of, lambda model: F.l1_loss(model(held_out, 0.0)[0].float(), held_out))
    stage.averaged(lambda model: _save_vae(model.vae, images[:2048], args.run / "vae" / "weights"))


def reconstruction(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of pixels, and of horizontal and vertical differences."""
    error = output.float() - target
    return error.abs().mean() + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def _save_vae(vae, images, path):
    encoded = torch.cat([vae.encode(pixels(chunk)).latent_dist.mode().float() for chunk in images.split(64)])
    vae.register_to_config(scaling_factor=round(1 / encoded.std().item(), 5))
    with replacing(path) as part:
        vae.save_pretrained(part)


# ---- the denoisers ---------------------------------------------------------------------------------------------------
def train(args) -> None:
    """A denoiser with its text encoders, a tenth of the captions dropped."""
    set_seed(args.seed)
    spec = SPECS[args.model]
    learner = spec.learner().to(memory_format=torch.channels_last)
    if args.begin:
        learner.begin(spec.pipeline.from_pretrained(args.begin).components)
    keep = args.run.parent / "checkpoints" / args.model
    stage = Stage(
        args.run / args.model,
        learner,
        settings_of(args, {"learning_rate": LEARNING_RATE}),
        args.every,
        keep=lambda model, share: export(model, spec, args.run / "vae" / "weights", keep / str(share)),
    )

    def load(split, size, count):
        found, captions = latents(args.run, split, size, count, stage.device)
        tokens = {name: each.to(stage.device) for name, each in learner.tokenized(captions).items()}
        return found.to(stage.device), tokens

    empty = {name: each.to(stage.device) for name, each in learner.tokenized([""]).items()}
    data = [load("train", size, args.scenes) for size in spec.sizes]
    held_out = load("validation", spec.sizes[0], min(HELD_OUT, args.scenes))

    batches = [args.batch // (size // spec.sizes[0]) ** 2 for size in spec.sizes]
    models = [
        stage.graphed(*drawn(*each, empty, batch, stage.generator(0)))
        for each, batch in zip(data, batches, strict=True)
    ]

    def loss_of(step):
        turn = step % len(spec.sizes)
        return models[turn](*drawn(*data[turn], empty, batches[turn], stage.generator(step))).mean()

    def validate(model):
        parts = [drawn(*held_out, None, 128, stage.generator(-1 - part)) for part in range(4)]
        return torch.stack([model(*part).mean() for part in parts]).mean()

    stage.train(loss_of, validate)


def drawn(
    images: Tensor, tokens: dict, empty: dict | None, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, dict]:
    """What a `Learner` is shown: a batch drawn by the generator; captions are dropped where there are `empty` ones."""
    device = images.device
    chosen = torch.randint(len(images), (batch,), generator=generator, device=device)
    draw, dropped = torch.rand(2, batch, generator=generator, device=device)
    picked = {name: each[chosen] for name, each in tokens.items()}
    if empty is not None:
        kept = (dropped >= CAPTION_DROPOUT)[:, None]
        picked = {name: torch.where(kept, each, empty[name]) for name, each in picked.items()}
    x = images[chosen].float()
    noise = torch.randn(x.shape, generator=generator, device=device)
    return x, noise, draw, picked


def export(learner: Learner, spec: Spec, vae: Path, place: Path) -> None:
    """A folder that the stock pipeline loads: the text encoders in float32, all else in half precision."""
    parts = {name: part for name, part in learner.parts.items() if not isinstance(part, torch.nn.Module)}
    for name, part in [*learner.named_children(), ("vae", AutoencoderKL.from_pretrained(vae))]:
        text = name.startswith("text")
        copy = type(part)(part.config) if text else type(part).from_config(_built(part.config))
        copy.load_state_dict(part.state_dict())
        parts[name] = copy if text else copy.half()
    if spec.pipeline.__name__ == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = spec.pipeline(**parts, scheduler=spec.scheduler())
    with replacing(place) as part:
        pipe.save_pretrained(part, safe_serialization=True)


def _built(config):
    """What a network is built from, without the folder that it came from."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


# ---- the finished model ----------------------------------------------------------------------------------------------
def ship(args) -> None:
    """The weights to their place, with the log and a sheet of samples; what is written by hand there stays."""
    spec, finished = SPECS[args.model], recovered(args.run.parent / "checkpoints" / args.model / "100")
    if not (finished / "model_index.json").is_file():
        raise ValueError(f"Expected a finished model in {finished}, but there is none: train {args.model} first.")
    with replacing(spec.place) as part:
        shutil.copytree(finished, part)
        if (card := spec.place / "README.md").exists():
            shutil.copy(card, part)
        for name in ("log.csv", "settings.json"):
            shutil.copy(args.run / args.model / name, part / f"training-{name}")
        samples(part, spec, args.seed)


def samples(place: Path, spec: Spec, seed: int) -> None:
    """samples.png: held-out scenes, their reproductions by the autoencoder, and pictures generated for their captions."""
    pipe = DiffusionPipeline.from_pretrained(place)
    pipe.set_progress_bar_config(desc="samples")
    scenes = [scene("validation", i, spec.sizes[0]) for i in range(12)]
    shown = pixels(torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2))
    with torch.no_grad():
        again = pipe.vae.decode(pipe.vae.encode(shown).latent_dist.mode()).sample.clamp(-1, 1)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(scenes))]
    asked = {name: [value] * len(scenes) if name == "negative_prompt" else value for name, value in spec.asked.items()}
    images = pipe(
        [s.caption for s in scenes], num_inference_steps=30, generator=generators, output_type="pt", **asked
    ).images
    sheet = torch.cat([torch.cat([*row], -1) for row in (shown / 2 + 0.5, again / 2 + 0.5, images)], -2)
    picture = pipe.image_processor.pt_to_numpy(sheet[None])
    pipe.image_processor.numpy_to_pil(picture)[0].save(place / "samples.png")


# ---- command line ----------------------------------------------------------------------------------------------------
def settings_of(args, defaults: dict) -> dict:
    """What the weights depend on."""
    named = ("model", "begin", "scenes", "steps", "batch", "seed", "mixed_precision")
    return {**defaults, **{name: getattr(args, name) for name in named}, **({"compile": True} if args.compile else {})}


def check(args) -> None:
    """ValueError unless what is read is there, and what is written can be."""
    if args.ship and args.model == "vae":
        raise ValueError("Expected a model to --ship, but got the autoencoder, which each model's folder holds.")
    if args.model != "vae" and not args.ship and not recovered(args.run / "vae" / "weights").is_dir():
        raise ValueError(
            f"Expected an autoencoder in {args.run / 'vae' / 'weights'}, but there is none: train vae first."
        )
    if args.begin and not (Path(args.begin) / "model_index.json").is_file():
        raise ValueError(f"Expected the folder of a model to --begin with, but got {args.begin}.")
    writable((SPECS[args.model].place if args.ship else args.run) / "part")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("model", choices=("vae", *SPECS))
    parser.add_argument("--ship", action="store_true", help="do not train: copy the finished model to its place")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/training"), help="folder of scenes, checkpoints and logs"
    )
    parser.add_argument("--begin", help="folder of the same model, whose weights the training begins with")
    parser.add_argument("--scenes", type=at_least(8), default=80_000, help="training scenes of each size")
    parser.add_argument("--steps", type=at_least(1), help="optimiser steps in all; default: the model's own")
    parser.add_argument("--batch", type=at_least(4), help="samples a step; default: the model's own")
    parser.add_argument("--every", type=at_least(1), default=250, help="steps between a checkpoint and the next")
    parser.add_argument("--mixed-precision", default="bf16", choices=("no", "bf16", "fp16"))
    parser.add_argument(
        "--compile", action="store_true", help="by inductor, on a GPU: minutes once, then twice the steps a second"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    own = VAE if args.model == "vae" else vars(SPECS[args.model])
    args.steps, args.batch = args.steps or own["steps"], args.batch or own["batch"]
    check(args)
    {True: ship, False: train_vae if args.model == "vae" else train}[args.ship](args)


if __name__ == "__main__":
    run_program(main)
