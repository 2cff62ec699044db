"""Records of attention: random ones in small, and those of the first step of each family's tiny model."""

import math
from functools import cache

import torch
import torch.nn.functional as F

from eval.cost.captured_step import Step, capture, sharpen
from goca_guidance.denoisers.adapters import denoiser_of
from goca_guidance.method.records import AttentionRecord, AttentionView, Regions
from tests.helpers.families import FAMILIES, stock_pipeline


def record(name="layer", b=2, heads=3, grid=(4, 4), keys=None, d=5, seed=0, channels=7, view=None):
    """Text keys, so many as `keys`, or else the pixels' own; a view says otherwise."""
    g = torch.Generator().manual_seed(seed)
    pixels = math.prod(grid)
    view = view or AttentionView(grid, **{"text" if keys else "image": slice(0, keys or pixels)})
    keys = keys or pixels
    q, k, v = (torch.randn(b, heads, n, d, generator=g) for n in (pixels, keys, keys))
    z = (q @ k.mT * d**-0.5).softmax(-1) @ v
    projection = torch.randn(heads * d, channels, generator=g)
    return AttentionRecord(name, q, k, v, z, d**-0.5, view, None, projection @ projection.mT)


TEXT_FIRST = AttentionView((4, 4), slice(0, 6), slice(6, 22))
IMAGE_FIRST = AttentionView((4, 4), slice(16, 22), slice(0, 16))


def joint_record(view, **kwargs):
    """Pixel queries, and the keys of six words and sixteen pixels."""
    return record(keys=22, view=view, **kwargs)


def projection_of(gram):
    """Some W with W W^T = gram: outputs are turned as a whole, which no inner product sees."""
    values, vectors = torch.linalg.eigh(gram.double())
    return (vectors * values.clamp(min=0).sqrt()).float()


PROMPTS = ["a cat on grass", "a bus"]  # the second one has fewer regions: padding


@cache
def step(name: str, dtype: torch.dtype = torch.float32, **size: int) -> Step:
    """The first step of a family's tiny model."""
    pipe = stock_pipeline(name).to(dtype=dtype)
    sharpen(denoiser_of(pipe.components), 6)
    call = {"prompt": PROMPTS, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    return capture(pipe, len(PROMPTS), **call, **FAMILIES[name].call | size)


def same(ours: Regions, theirs: Regions) -> bool:
    return torch.equal(ours.masks, theirs.masks) and torch.equal(ours.foreground, theirs.foreground)


def resized_affinity(a, grid, reference):
    """The naive form: keys bilinear, queries nearest."""
    keys = F.interpolate(a.unflatten(-1, grid), reference, mode="bilinear" if len(grid) == 2 else "trilinear").flatten(
        2
    )
    return F.interpolate(keys.mT.unflatten(-1, grid), reference, mode="nearest").flatten(2).mT
