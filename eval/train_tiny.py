"""Train the embedded model: a tiny but genuine Stable Diffusion on synthetic scenes, from the stock component classes.

    python -m eval.train_tiny vae   --steps 2500            # AutoencoderKL, 64 px -> 16x16x4
    python -m eval.train_tiny unet  --steps 4000            # UNet2DConditionModel and CLIPTextModel together
    python -m eval.train_tiny export                        # fp16 folder that StableDiffusionPipeline.from_pretrained loads
    python -m eval.train_tiny samples                       # scenes, reproductions and generated images, for the card

Each stage resumes from its last checkpoint in --run when it is started again; what a step draws depends on the seed and
the step's number alone, so a resumed run and an unbroken one see the same data.
"""

import csv
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from eval.common.files import expecting, intact, recovered, replacing, writable
from eval.common.programs import at_least, command_line, positive
from eval.common.programs import run as run_program
from eval.common.provenance import weights_digest
from eval.scenes.scene import scene
from eval.scenes.tiny_model import (
    LATENT,
    SCHEDULE,
    SIZE,
    build_text_encoder,
    build_unet,
    build_vae,
    caption_words,
    clip_tokenizer,
)


CAPTION_DROPOUT = 0.1  # fraction of samples that train the unconditional branch


# ---- networks as one forward -----------------------------------------------------------------------------------------
class TextToNoise(torch.nn.Module):
    """The two networks that learn together: token ids and a noisy latent to the noise in it."""

    def __init__(self, unet, text_encoder):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, latents, timesteps, ids):
        return self.unet(latents, timesteps, self.text_encoder(ids).last_hidden_state).sample


class Autoencoding(torch.nn.Module):
    """An autoencoder as one forward: pixels and posterior noise to the reconstruction and the KL of the posterior."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, pixels, noise):
        posterior = self.vae.encode(pixels).latent_dist
        return self.vae.decode(posterior.mean + posterior.std * noise).sample, posterior.kl()


# ---- data ------------------------------------------------------------------------------------------------------------
def scenes_of(run: Path, split: str, count: int) -> tuple[torch.Tensor, list[str]]:
    """Images [N 3 H W] uint8 and captions of the first scenes, which are drawn once and kept in one .npz."""
    path = run / f"scenes-{split}-{count}.npz"
    if (found := intact(path, _read_scenes)) is None:
        drawn = [scene(split, i, SIZE) for i in tqdm(range(count), desc=f"drawing {split} scenes")]
        with replacing(path) as part, part.open("wb") as file:
            np.savez(file, images=np.stack([s.image for s in drawn]), captions=np.array([s.caption for s in drawn]))
        found = _read_scenes(path)
    return found


def _read_scenes(path):
    with np.load(path) as file:
        return torch.from_numpy(file["images"]).permute(0, 3, 1, 2).contiguous(), file["captions"].tolist()


# ---- a resumable loop ------------------------------------------------------------------------------------------------
class Stage:
    """One training stage: model, optimiser, EMA, schedule, log and checkpoint; `loss_of(model, step)` is all it asks."""

    def __init__(self, name, model, args, learning_rate):
        self.name, self.args, self.run, self.step = name, args, args.run / name, 0
        self.run.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(mixed_precision=args.mixed_precision)
        optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        self.ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.accelerator.register_for_checkpointing(self.schedule)
        self.ema.to(self.accelerator.device)
        self._resume()

    def _rate(self, step):
        """Warm up, hold, then fall linearly to zero over the last `decay` of the run."""
        left = (self.args.steps - step) / max(1, self.args.decay * self.args.steps)
        return min(1.0, (step + 1) / 200, max(left, 0.01))

    def _resume(self):
        path = recovered(self.run / "checkpoint")
        if path.exists():
            with expecting("a whole checkpoint", path, "remove it, and the stage begins anew"):
                self.accelerator.load_state(path)
                self.ema.load_state_dict(torch.load(path / "ema.pt", map_location=self.accelerator.device))
            self.step = self.schedule.last_epoch

    def save(self):
        if not self.accelerator.is_main_process:
            return
        with replacing(self.run / "checkpoint") as part:
            self.accelerator.save_state(part)
            torch.save(self.ema.state_dict(), part / "ema.pt")

    def generator(self, step) -> torch.Generator:
        """The only source of randomness of a step, so that a resumed run repeats an unbroken one."""
        return torch.Generator().manual_seed(hash((self.args.seed, self.accelerator.process_index, step)) % 2**63)

    def train(self, loss_of, validate):
        bar = tqdm(
            total=self.args.steps, initial=self.step, desc=self.name, disable=not self.accelerator.is_main_process
        )
        running, started, first = None, time.perf_counter(), self.step
        while self.step < self.args.steps:
            with self.accelerator.autocast():
                loss = loss_of(self.model, self.generator(self.step))
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.ema.step(self.model.parameters())
            self.step += 1
            running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
            bar.update()
            bar.set_postfix(loss=f"{running:.4f}")
            if self.step % self.args.every == 0 or self.step == self.args.steps:
                rate = (self.step - first) * self.args.batch / (time.perf_counter() - started)
                validation = self.averaged(validate)
                self.save()
                self._log(running, validation, rate)

    def averaged(self, function):
        """Call `function(model)` with the averaged weights in place, without gradients."""
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        try:
            with torch.no_grad(), self.accelerator.autocast():
                return function(self.accelerator.unwrap_model(self.model).eval())
        finally:
            self.ema.restore(self.model.parameters())
            self.model.train()

    def _log(self, loss, validation, rate):
        row = {
            "step": self.step,
            "samples": self.step * self.args.batch * self.accelerator.num_processes,
            "loss": f"{loss:.5f}",
            "validation": f"{float(validation):.5f}",
            "learning_rate": f"{self.schedule.get_last_lr()[0]:.2e}",
            "samples_per_second": f"{rate:.1f}",
        }
        path = self.run / "log.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)


# ---- stages ----------------------------------------------------------------------------------------------------------
def train_vae(args):
    """L1 on pixels and on their differences (edges), and the usual small KL."""
    set_seed(args.seed)
    images, _ = scenes_of(args.run, "train", args.scenes)
    held_out = _pixels(scenes_of(args.run, "validation", 256)[0])
    stage = Stage("vae", Autoencoding(build_vae()).to(memory_format=torch.channels_last), args, learning_rate=1e-3)
    device = stage.accelerator.device

    def loss_of(model, generator):
        x = _pixels(images[torch.randint(len(images), (args.batch,), generator=generator)])
        noise = torch.randn(args.batch, 4, LATENT, LATENT, generator=generator)
        output, kl = model(x.to(device), noise.to(device))
        return reconstruction(output, x.to(device)) + 1e-6 * kl.mean()

    def validate(model):
        return F.l1_loss(model(held_out.to(device), torch.zeros(1, device=device))[0].float(), held_out.to(device))

    stage.train(loss_of, validate)
    stage.averaged(lambda model: _save_vae(model.vae, images, args.run / "vae" / "weights", device))


def reconstruction(output, target):
    """Mean absolute error of pixels, and of horizontal and vertical differences."""
    error = output.float() - target
    return error.abs().mean() + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def _pixels(images):
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _save_vae(vae, images, path, device):
    latents = torch.cat(
        [vae.encode(_pixels(chunk).to(device)).latent_dist.mode().float() for chunk in images[:2048].split(64)]
    )
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    with replacing(path) as part:
        vae.save_pretrained(part)


def latents_of(run: Path, split: str, count: int, device) -> torch.Tensor:
    """Scaled latents of every scene, [N 4 16 16], encoded once for each autoencoder."""
    path = run / f"latents-{split}-{count}-{weights_digest(str(run / 'vae'))}.pt"
    if (found := intact(path, torch.load)) is None:
        vae = AutoencoderKL.from_pretrained(run / "vae" / "weights").to(device, memory_format=torch.channels_last)
        chunks, encoded = scenes_of(run, split, count)[0].split(128), []
        with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16):
            for chunk in tqdm(chunks, desc=f"encoding {split} scenes"):
                encoded.append(vae.encode(_pixels(chunk).to(device)).latent_dist.mode().float().cpu())
        found = (torch.cat(encoded) * vae.config.scaling_factor).half()
        with replacing(path) as part:
            torch.save(found, part)
    return found.float()


def train_unet(args):
    """Epsilon prediction at uniform timesteps, a tenth of the captions dropped."""
    set_seed(args.seed)
    tokenizer = clip_tokenizer(caption_words())
    stage = Stage("unet", TextToNoise(build_unet(), build_text_encoder(tokenizer)), args, learning_rate=1e-3)
    device, noiser = stage.accelerator.device, DDPMScheduler(**SCHEDULE)

    def load(split, count):
        _, captions = scenes_of(args.run, split, count)
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return latents_of(args.run, split, count, device), ids

    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids

    def loss_of(model, generator, data, dropout=CAPTION_DROPOUT, batch=args.batch):
        latents, captions = data
        index = torch.randint(len(latents), (batch,), generator=generator)
        x, ids = latents[index], captions[index]
        ids = torch.where(torch.rand(batch, 1, generator=generator) < dropout, empty, ids)
        noise = torch.randn(x.shape, generator=generator)
        timesteps = torch.randint(1000, (batch,), generator=generator)
        noisy = noiser.add_noise(x, noise, timesteps)
        return F.mse_loss(model(noisy.to(device), timesteps.to(device), ids.to(device)).float(), noise.to(device))

    train, held_out = load("train", args.scenes), load("validation", 512)
    stage.train(
        lambda model, generator: loss_of(model, generator, train),
        lambda model: loss_of(model, stage.generator(-1), held_out, dropout=0.0, batch=512),
    )


def export(args):
    """Write the averaged weights as an fp16 folder of stock components, whole or not at all."""
    tokenizer = clip_tokenizer(caption_words())
    model = TextToNoise(build_unet(), build_text_encoder(tokenizer))
    ema = EMAModel(model.parameters())
    ema.load_state_dict(torch.load(args.run / "unet" / "checkpoint" / "ema.pt", map_location="cpu"))
    ema.copy_to(model.parameters())
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(args.run / "vae" / "weights"),
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    kept = {
        path.name: path.read_bytes() for name in ("README.md", "samples.png") if (path := args.out / name).exists()
    }
    with replacing(args.out) as part:
        # The text encoder stays float32: transformers would load it in its stored dtype beside a float32 U-Net.
        pipe.unet.half(), pipe.vae.half()
        pipe.save_pretrained(part, safe_serialization=True)
        for name, content in kept.items():
            (part / name).write_bytes(content)


def samples(args):
    """A sheet for the model card: held-out scenes, their reproductions, and images generated for their captions."""
    pipe = StableDiffusionPipeline.from_pretrained(args.out)
    pipe.set_progress_bar_config(disable=True)
    scenes = [scene("validation", i, SIZE) for i in range(12)]
    pixels = _pixels(torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2))
    with torch.no_grad():
        shown = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(len(scenes))]
    captions = [s.caption for s in scenes]
    images = pipe(captions, guidance_scale=5.0, num_inference_steps=30, generator=generators, output_type="pt").images
    sheet = torch.cat([torch.cat([*row], -1) for row in (pixels / 2 + 0.5, shown / 2 + 0.5, images)], -2)
    picture = pipe.image_processor.pt_to_numpy(sheet[None])
    with replacing(args.out / "samples.png") as part:
        pipe.image_processor.numpy_to_pil(picture)[0].save(part, format="PNG")
    print("\n".join(captions))


def check_stage(args) -> None:
    """ValueError unless what the stage reads is there, and what it writes can be written."""
    needed = {"unet": ["vae/weights"], "export": ["vae/weights", "unet/checkpoint"], "samples": []}.get(args.stage, [])
    for place in needed:
        if not recovered(args.run / place).is_dir():
            raise ValueError(
                f"Expected {args.run / place}, but it is not there: run the stage {place.split('/')[0]} first."
            )
    writable((args.run if args.stage in ("vae", "unet") else args.out) / "part")
    there = args.out.is_dir() and any(args.out.iterdir())
    reads_model = args.stage == "samples" or (args.stage == "export" and there)
    if reads_model and not (args.out / "model_index.json").is_file():
        raise ValueError(f"Expected a model in {args.out}, but there is none: name the folder of one with --out.")


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("stage", choices=("vae", "unet", "export", "samples"))
    parser.add_argument(
        "--run", type=Path, default=Path("runs/tiny-sd"), help="folder of scenes, checkpoints and logs"
    )
    parser.add_argument("--out", type=Path, default=Path("goca_guidance/models/tiny-sd"), help="where `export` writes")
    parser.add_argument("--scenes", type=at_least(1), default=50_000, help="training scenes")
    parser.add_argument(
        "--steps", type=at_least(1), default=4000, help="optimiser steps in all, those of earlier runs included"
    )
    parser.add_argument("--batch", type=at_least(1), default=64, help="samples a step and process")
    parser.add_argument("--decay", type=positive, default=0.5, help="last fraction of the run in which the rate falls")
    parser.add_argument(
        "--every", type=at_least(1), default=250, help="steps between a log row with a checkpoint and the next"
    )
    parser.add_argument("--mixed-precision", default="bf16", choices=("no", "bf16", "fp16"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    check_stage(args)
    {"vae": train_vae, "unet": train_unet, "export": export, "samples": samples}[args.stage](args)


if __name__ == "__main__":
    run_program(main)
