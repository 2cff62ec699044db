"""Time and peak memory of a GoCA-S-CFG step over the stock step, in one run: `python -m eval.speed`.

Stock and guided calls alternate, so that a machine whose speed drifts slows both; a step's time is the median over all
steps of all calls but each call's first. Memory is the peak during a call in a process of its own: resident memory on the
CPU, allocated memory on an accelerator. Full-size denoisers have random weights: time does not depend on them.
"""

import argparse
import multiprocessing
import platform
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

from eval.report import command, markdown, write_json
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
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),  # else the class defaults, which are SD's
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**SCHEDULE, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


FAMILIES = {"tiny-sd": tiny, "sd-1.5": stable_diffusion_1}


@dataclass(frozen=True)
class Case:
    """What one row measures."""

    family: str
    batch: int
    steps: int
    repeats: int
    device: str
    dtype: str

    def pipelines(self) -> dict[str, StableDiffusionPipeline]:
        """Stock and guided, on the same modules."""
        stock = FAMILIES[self.family]().to(self.device, getattr(torch, self.dtype))
        pipes = {"stock": stock, "guided": GoCASCFGPipeline.from_pipe(stock)}
        for pipe in pipes.values():
            pipe.set_progress_bar_config(disable=True)
        return pipes

    def call(self, pipe, steps: int, **kwargs):
        """Generate latents."""
        generator, prompts = torch.Generator().manual_seed(0), [PROMPT] * self.batch
        return pipe(
            prompts, guidance_scale=5.0, num_inference_steps=steps, output_type="latent", generator=generator, **kwargs
        )


def step_seconds(case: Case) -> dict[str, float]:
    """Median seconds of a step: stock and guided calls alternate, the first round warms up, first steps do not count."""
    pipes, found = case.pipelines(), {"stock": [], "guided": []}
    for repeat in tqdm(range(case.repeats + 1), desc=f"{case.family}, batch {case.batch}"):
        for name, pipe in pipes.items():
            stamps: list[float] = []

            def stamp(pipe, step, timestep, tensors, stamps=stamps):
                if case.device == "cuda":
                    torch.cuda.synchronize()
                stamps.append(time.perf_counter())
                return tensors

            case.call(pipe, case.steps if repeat else 2, callback_on_step_end=stamp)
            if repeat:
                found[name] += [b - a for a, b in pairwise(stamps)]
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def peak_bytes(case: Case, name: str) -> int:
    """Peak memory of one call of two steps; run it in a process of its own."""
    pipe = case.pipelines()[name]
    with _PeakMemory(case.device) as memory:
        case.call(pipe, 2)
    return memory.peak


class _PeakMemory:
    """Peak memory while the block runs."""

    def __init__(self, device: str):
        self.device, self.peak = device, 0

    def __enter__(self):
        if self.device == "cuda":
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
        if self.device == "cuda":
            self.peak = torch.cuda.max_memory_allocated()


def compare(case: Case) -> dict:
    """A row of the table."""
    peaks = {}
    for name in ("stock", "guided"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            peaks[name] = process.submit(peak_bytes, case, name).result()
    seconds = step_seconds(case)
    return {
        "device": device_name(case.device),
        "family": case.family,
        "batch": case.batch,
        "stock_ms": round(1000 * seconds["stock"], 1),
        "guided_ms": round(1000 * seconds["guided"], 1),
        "time_ratio": round(seconds["guided"] / seconds["stock"], 3),
        "stock_mb": peaks["stock"] // 2**20,
        "memory_ratio": round(peaks["guided"] / peaks["stock"], 3),
    }


def device_name(device: str) -> str:
    """What the numbers were measured on."""
    return (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--result", type=Path, help="results/speed-DEVICE.json by default")
    args = parser.parse_args()
    shared = (args.steps, args.repeats, args.device, args.dtype)
    rows = [compare(Case(family, batch, *shared)) for family in args.families for batch in args.batch]
    settings = {"steps": args.steps, "repeats": args.repeats, "dtype": args.dtype, "torch": torch.__version__}
    result = args.result or Path(f"results/speed-{args.device}.json")
    write_json(result, {"command": command(), "settings": settings, "rows": rows})
    print(markdown(rows))


if __name__ == "__main__":
    main()
