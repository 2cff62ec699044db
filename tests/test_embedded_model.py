"""The embedded model: small, loadable by everyone, and good enough to show the method."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextModel

from eval.scenes import scene
from eval.segment import running
from eval.segment.experiment import Experiment
from goca_guidance import TINY_SD, GoCASCFGPipeline, models


def test_stock_component_classes():
    pipe = StableDiffusionPipeline.from_pretrained(TINY_SD)
    assert type(pipe.unet) is UNet2DConditionModel
    assert type(pipe.vae) is AutoencoderKL
    assert type(pipe.text_encoder) is CLIPTextModel
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert len(pipe.unet.config.block_out_channels) == 3


def test_small_and_half_precision():
    files = list(Path(TINY_SD).rglob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) <= 20 * 2**20
    with safe_open(Path(TINY_SD) / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.get_tensor(next(iter(file.keys()))).dtype == torch.float16


def test_what_it_is_said_to_know_is_what_scenes_show():
    assert (set(models.OBJECTS), models.GROUNDS) == (set(scene.OBJECTS), scene.GROUNDS)


def test_card_says_what_it_is():
    card = (Path(TINY_SD) / "README.md").read_text()
    assert all(word in card for word in ("synthetic", "seed", "loss", "mIoU", "timestep"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_generates_in_every_dtype(dtype):
    pipe = GoCASCFGPipeline.from_pretrained(TINY_SD, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(
        "a cat on grass", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)
    )
    assert np.isfinite(output.images).all()


def test_goca_beats_vanilla_on_held_out_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "RUNS", tmp_path)
    vanilla, goca = running.result(Experiment({"vanilla": {}, "goca": {}}, split="validation", limit=60))["rows"]
    assert goca["miou"] > vanilla["miou"]
    assert goca["miou"] > 0.6
