"""The full-size pipelines that speed is measured on, and the counting of what GoCA-S-CFG must add."""

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
    assert set(PUBLISHED) | {"tiny-sd", "flux-short"} == set(ARCHITECTURES)


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


def test_least_cost_of_stable_diffusion_by_hand():
    step = operations.stock_step("sd-1.5")
    assert step.flops == pytest.approx(1.6e12, rel=0.02)  # two predictions of 0.8 TFLOP
    parts = operations.added(step)
    levels = [(5, 4096, 320), (5, 1024, 640), (5, 256, 1280), (1, 64, 1280)]  # layers, pixels, channels
    assert parts["heads"].flops == 2 * sum(count * 2 * p * c * c for count, p, c in levels)
    assert parts["heads"].flops == pytest.approx(25.6e9, rel=0.001)
    assert parts["cross"].exponentials == 2 * sum(count * p * 77 * 8 for count, p, _ in levels)
    rows = {4096: 1024, 1024: 1024, 256: 256, 64: 64}  # that a resize to 32 x 32 reads
    assert parts["agreement"].flops == sum(count * 2 * rows[p] * p * (c + 1) for count, p, c in levels)
    assert parts["refinement"].flops == 3 * 2 * 3072 * 4096 * 320 + 2 * 2 * 4096**2 * 6


def test_least_cost_of_joint_attention_counts_probabilities_once():
    parts = operations.added(operations.stock_step("flux-short"))
    assert parts["heads"] == parts["cross"] == operations.Cost()
    assert parts["agreement"].flops == 6 * 2 * 4096 * (4096 + 512) * (3072 + 1)
    assert parts["refinement"].flops == 2 * 2 * 4096**2 * 6
