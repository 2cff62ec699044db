"""Folders of generated images, and networks in small that judge them."""

import hashlib
import json

import numpy as np
import pandas as pd
import torch
from PIL import Image

from eval.generation.generator import GenerationSettings
from eval.generation.networks import PREPROCESSINGS, Backbone


CPU = torch.device("cpu")


def run_folder(root, method="cfg", ids=("000000", "000001", "000002"), seed=0, size=(64, 64), **changes):
    """A run folder as `eval.coco30k` leaves it; images of noise."""
    (root / "images").mkdir(parents=True)
    rng, rows = np.random.default_rng(seed), []
    for number, name in enumerate(ids):
        path = root / "images" / f"{name}.png"
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append((name, ("a cat on grass", "a dog and a bus on sand", "bird, sky")[number % 3], 7, digest))
    table = pd.DataFrame(rows, columns=["id", "caption", "seed", "sha256"])
    table.insert(3, "file", [f"images/{name}.png" for name in ids])
    table.to_csv(root / "manifest.csv", index=False)
    settings = {
        "method": method,
        "model": "tiny",
        "captions": "scenes",
        "guidance_scale": 5.0,
        "steps": 20,
        "seed": 42,
    }
    (root / "settings.json").write_text(json.dumps({"command": "", "settings": settings | changes}))
    return root


def picture(width, height, seed=0):
    """Noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def folder_of(root, count, size=(64, 64)):
    """A folder of so many pictures."""
    root.mkdir(parents=True)
    for number in range(count):
        picture(*size, seed=100 + number).save(root / f"{number}.png")
    return root


def mixing(preprocessing="t2ibenchmark", size=5):
    """A network in small, in Inception's place: what it does is on 8 x 8 pixels."""
    matrix = torch.randn(192, size, generator=torch.Generator().manual_seed(1))
    return Backbone(
        {"network": "inception", "weights": "tiny", "preprocessing": preprocessing},
        lambda image: PREPROCESSINGS[preprocessing].resize(image, 8) / 255,
        lambda images, captions: images.flatten(1) @ matrix,
    )


def few(**changes):
    """Settings of a small run of generation."""
    return GenerationSettings(**{"method": "cfg", "count": 7, "steps": 2, "batch": 3, "size": 32} | changes)
