"""Time and peak memory of a GoCA-S-CFG step over the stock step, in one run: `python -m eval.speed`.

Stock and guided calls alternate, so that a machine whose speed drifts slows both; a step's time is the median over all
steps of all calls but each call's first. Memory is the peak during a call: resident memory on the CPU, allocated memory
on an accelerator. Full-size denoisers have random weights: time does not depend on them.
"""

import argparse
import platform
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

from eval.report import markdown, write_json
from eval.tiny_components import SCHEDULE, caption_words, clip_tokenizer
from goca_guidance import TINY_SD, GoCASCFGPipeline


PROMPT = "a photo of a cat and a potted plant and a bus on grass"


def tiny() -> StableDiffusionPipeline:
    """The embedded model."""
    return StableDiffusionPipeline.from_pretrained(TINY_SD)


def stable_diffusion_1() -> StableDiffusionPipeline:
    """The full-size U-Net of Stable Diffusion 1.5, random weights; a small text encoder and autoencoder around it."""
    tokenizer = clip_tokenizer(caption_words(), max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=768, num_hidden_layers=1, eos_token_id=tokenizer.eos_token_id
    )
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                        block_out_channels=(32,) * 4, latent_channels=4)  # fmt: skip
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768
        ),  # the class defaults are Stable Diffusion's
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**SCHEDULE, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


FAMILIES = {"tiny-sd": tiny, "sd-1.5": stable_diffusion_1}


@dataclass
class Usage:
    """Seconds of each step but the first, and peak bytes, of one call."""

    seconds: list[float]
    peak: int


def measure(call: Callable, steps: int, device: torch.device) -> Usage:
    """One call of `steps` denoising steps."""
    stamps, sampler = [], _PeakMemory(device)

    def stamp(pipe, step, timestep, tensors):
        if device.type == "cuda":
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())
        return tensors

    with sampler:
        call(num_inference_steps=steps, callback_on_step_end=stamp)
    return Usage([b - a for a, b in pairwise(stamps)], sampler.peak)


class _PeakMemory:
    """Peak memory while the block runs."""

    def __init__(self, device: torch.device):
        self.device, self.peak = device, 0

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self):
        process = psutil.Process()
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, process.memory_info().rss)

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated()


def compare(family: str, batch: int, steps: int, repeats: int, device: torch.device, dtype: torch.dtype) -> dict:
    """A row: stock and guided steps of one family, alternating."""
    stock = FAMILIES[family]().to(device, dtype)
    guided = GoCASCFGPipeline.from_pipe(stock)
    usages: dict[str, list[Usage]] = {"stock": [], "guided": []}
    for repeat in tqdm(range(repeats + 1), desc=f"{family} batch {batch}"):
        for name, pipe in (("stock", stock), ("guided", guided)):
            pipe.set_progress_bar_config(disable=True)

            def call(pipe=pipe, **kwargs):
                generator = torch.Generator().manual_seed(0)
                return pipe([PROMPT] * batch, guidance_scale=5.0, output_type="latent", generator=generator, **kwargs)

            usage = measure(call, steps if repeat else 2, device)
            if repeat:  # the first round warms up
                usages[name].append(usage)
    seconds = {name: statistics.median(s for usage in found for s in usage.seconds) for name, found in usages.items()}
    peaks = {name: max(usage.peak for usage in found) for name, found in usages.items()}
    size = stock.unet.config.sample_size * stock.vae_scale_factor
    return {
        "device": device_name(device),
        "family": family,
        "size": size,
        "batch": batch,
        "stock_ms": round(1000 * seconds["stock"], 1),
        "guided_ms": round(1000 * seconds["guided"], 1),
        "time_ratio": round(seconds["guided"] / seconds["stock"], 3),
        "stock_mb": peaks["stock"] // 2**20,
        "memory_ratio": round(peaks["guided"] / peaks["stock"], 3),
    }


def device_name(device: torch.device) -> str:
    """What the numbers were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--result", type=Path, default=Path("results/speed-cpu.json"))
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    rows = [
        compare(family, batch, args.steps, args.repeats, device, dtype)
        for family in args.families
        for batch in args.batch
    ]
    write_json(
        args.result, {"command": "python -m eval.speed", "steps": args.steps, "repeats": args.repeats, "rows": rows}
    )
    print(markdown(rows))


if __name__ == "__main__":
    main()
