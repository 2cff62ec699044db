"""What this machine has, and which ways of computing attention can be observed on it."""

import platform
from importlib import metadata

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from goca_guidance import TINY_SD, GoCASCFGPipeline


def doctor() -> None:
    """Print what this machine has, and try the ways of computing attention on the embedded model."""
    print(f"python {platform.python_version()} on {platform.platform()}")
    for package in ("goca-guidance", "torch", "diffusers", "transformers", "accelerate", "jaxtyping"):
        print(f"{package} {metadata.version(package)}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices: cpu ({torch.get_num_threads()} threads){''.join(f', cuda ({name})' for name in gpus)}")
    print(f"embedded model: {TINY_SD}")
    for name, outcome in _try_processors().items():
        print(f"attention, {name}: {outcome}")


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
