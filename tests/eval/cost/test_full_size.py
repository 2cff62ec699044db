"""The full-size pipelines that speed is measured on."""

import pytest
import torch

from eval.cost import operations
from eval.cost.full_size import ARCHITECTURES, arguments, build, guided_arguments
from goca_guidance import GoCASCFGPipeline
from goca_guidance.denoisers.adapters import denoiser_of, family_of


PUBLISHED = {  # attention layers that the method reads, parameters of the denoiser
    "sd-1.5": (16, 0.860e9),
    "sdxl": (70, 2.57e9),
    "pixart-sigma": (28, 0.61e9),
    "hunyuan": (10, 1.5e9),
    "sd3": (24, 2.03e9),
    "flux": (57, 11.9e9),
}


def test_every_architecture_is_tested():
    assert set(PUBLISHED) | {"tiny-sd", "flux-short", "sd-1.5-quarter"} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    denoiser = denoiser_of(build(name, "meta").components)
    layers, parameters = PUBLISHED[name]
    assert len(family_of(denoiser).preset.text) == layers
    assert sum(p.numel() for p in denoiser.parameters()) == pytest.approx(parameters, rel=0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_pipeline_takes_the_arguments(name):
    pipe = build(name, "meta", torch.float16)
    _, kwargs = operations.denoiser_inputs(pipe, arguments(name, pipe, ARCHITECTURES[name].size, batch=2, steps=2))
    assert len(kwargs["encoder_hidden_states"]) == (2 if name == "flux" else 4)


def test_tiny_runs_stock_and_guided():
    stock = build("tiny-sd")
    guided = GoCASCFGPipeline.from_pipe(stock)
    plain = stock(**arguments("tiny-sd", stock, 64, batch=2, steps=2)).images
    out = guided(**arguments("tiny-sd", stock, 64, batch=2, steps=2), **guided_arguments("tiny-sd"))
    assert plain.shape == out.images.shape == (2, 4, 16, 16)
    assert out.images.isfinite().all()
    assert not torch.equal(plain, out.images)
