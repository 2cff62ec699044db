"""What this machine has, and which ways of computing attention can be observed on it."""

import platform
from importlib import metadata

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from goca_guidance import TINY_SD, GoCASCFGPipeline
from goca_guidance.method import kernels


CONFIRMED = "an H200 found an earlier form of them right, and their gain in a whole step was not measured"


def doctor() -> None:
    """Print what this machine has, and try the ways of computing attention on the embedded model."""
    print(f"python {platform.python_version()} on {platform.platform()}")
    for package in ("goca-guidance", "torch", "diffusers", "transformers", "accelerate", "jaxtyping"):
        print(f"{package} {metadata.version(package)}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices: cpu ({torch.get_num_threads()} threads){''.join(f', cuda ({name})' for name in gpus)}")
    print(f"embedded model: {TINY_SD}")
    for line in kernel_lines():
        print(line)
    for name, outcome in _try_processors().items():
        print(f"attention, {name}: {outcome}")


def kernel_lines() -> list[str]:
    """Triton's version; whether the fused kernels could run, on the first GPU if there is one; whether they are on."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        version = "is not installed"
    hindrance = kernels.hindrance(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    able = "they can be used" if hindrance is None else f"they cannot be used: {hindrance}"
    state = "on" if kernels.enabled() else f"off: GOCA_TRITON=1 turns them on; {CONFIRMED}"
    return [f"triton {version}", f"fused kernels: {able}", f"fused kernels: {state}"]


def _try_processors() -> dict[str, str]:
    """Which ways of computing attention the observer sees, tried for real."""
    ways = {
        "scaled dot product (the default)": lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
        "fused projections": lambda unet: unet.fuse_qkv_projections(),
        "legacy AttnProcessor": lambda unet: unet.set_attn_processor(AttnProcessor()),
        "attention slicing": lambda unet: unet.set_attention_slice("max"),
    }
    outcomes = {}
    for name, prepare in ways.items():
        pipe = GoCASCFGPipeline.from_pretrained(TINY_SD)
        pipe.set_progress_bar_config(disable=True)
        prepare(pipe.unet)
        try:
            pipe("a cat", num_inference_steps=1, output_type="latent")
            outcomes[name] = "works"
        except RuntimeError as error:
            if "scaled-dot-product" not in str(error):
                raise
            outcomes[name] = "hidden from the observer: refused with the fix"
    return outcomes
