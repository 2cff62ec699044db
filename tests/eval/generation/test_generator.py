"""Settings of generation, and what reaches the pipeline of each family."""

import dataclasses
import tomllib
import zlib

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from eval.common.configs import from_mapping
from eval.common.load import load_pipeline
from eval.generation import generator as generation
from eval.generation.generator import GenerationSettings, Generator
from eval.generation.run_folder import png_bytes
from goca_guidance import GoCASCFGPipeline
from tests.helpers.families import FAMILIES, stock_pipeline
from tests.helpers.places import ROOT
from tests.helpers.runs import few
from tests.helpers.tiny import stock_of


pytestmark = pytest.mark.usefixtures("one_model")


def test_captions_scale_and_scheduler_reach_the_pipeline(tiny):
    settings = few(scheduler="DPMSolverMultistepScheduler", guidance_scale=3.0, seed=7)
    generator = Generator(settings, "cpu")
    assert isinstance(generator.pipe.scheduler, DPMSolverMultistepScheduler)
    assert not isinstance(tiny.scheduler, DPMSolverMultistepScheduler)
    stock = stock_of(tiny)
    stock.scheduler = DPMSolverMultistepScheduler.from_config(tiny.scheduler.config)
    noise = torch.Generator().manual_seed(zlib.crc32(b"7 x"))
    expected = stock("a cat", num_inference_steps=2, guidance_scale=3.0, height=32, width=32, generator=noise).images[
        0
    ]
    images, reasons = generator({"x": "a cat"}, ["x"])
    assert (png_bytes(images["x"]), reasons) == (png_bytes(expected), {})


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_guided(name, monkeypatch):
    """At the scale of the settings, which for Flux is that of true guidance."""
    stock = stock_pipeline(name)
    monkeypatch.setattr(generation, "load_pipeline", lambda *args: GoCASCFGPipeline.from_pipe(stock))
    family, found = FAMILIES[name], {}
    for method in ("cfg", "goca"):
        settings = few(method=method, size=family.call["height"], guidance_scale=4.0)
        found[method] = Generator(settings, "cpu").pixels({"7": "a cat on grass"})
    flux = {"negative_prompt": "", "true_cfg_scale": 4.0} if name == "flux" else {"guidance_scale": 4.0}
    side, noise = family.call["height"], torch.Generator().manual_seed(zlib.crc32(b"42 7"))
    small = {"num_inference_steps": 2, "height": side, "width": side, "output_type": "np", "generator": [noise]}
    binning = {k: v for k, v in family.call.items() if k == "use_resolution_binning"}
    np.testing.assert_array_equal(found["cfg"], stock(["a cat on grass"], **small, **flux, **binning).images)
    assert found["goca"].shape == (1, side, side, 3)
    assert abs(found["goca"] - found["cfg"]).max() > 0


def test_no_safety_checker_and_no_watermark(monkeypatch, tiny):
    def load(*args):
        pipe = GoCASCFGPipeline.from_pipe(tiny)
        pipe.register_modules(safety_checker=torch.nn.Identity())
        pipe.watermark = object()
        return pipe

    monkeypatch.setattr(generation, "load_pipeline", load)
    pipe = generation.pipeline(few())
    assert (pipe.safety_checker, pipe.watermark) == (None, None)


def test_another_denoiser(tmp_path, monkeypatch):
    """A folder that holds a denoiser only, in the pipeline of another; its weights are among the settings."""
    stock, other = stock_pipeline("pixart-sigma"), stock_pipeline("pixart-sigma")
    torch.nn.init.ones_(other.transformer.proj_out.weight)
    stock.save_pretrained(tmp_path / "whole")
    other.transformer.save_pretrained(tmp_path / "other" / "transformer")
    monkeypatch.setattr(generation, "load_pipeline", load_pipeline)
    plain = few(model=str(tmp_path / "whole"), captions="scenes", count=1)
    changed = dataclasses.replace(plain, denoiser=str(tmp_path / "other"))
    weights = generation.pipeline(changed, "cpu").transformer.proj_out.weight
    assert torch.equal(weights, torch.ones_like(weights))
    assert not torch.equal(weights, generation.pipeline(plain, "cpu").transformer.proj_out.weight)
    digests = {settings.described(settings.texts())["weights"] for settings in (plain, changed)}
    assert len(digests) == 2


def test_a_failed_decoding_in_half_precision_spoils_no_other(monkeypatch):
    """SDXL's decoder is brought to float32 for a call, and back only where the call ends well."""
    pipe = GoCASCFGPipeline.from_pipe(stock_pipeline("sdxl")).to(torch.float16)
    monkeypatch.setattr(generation, "load_pipeline", lambda *args: pipe)
    generator = Generator(few(size=FAMILIES["sdxl"].call["height"]), "cpu")
    expected, _ = generator({"1": "a cat"}, ["1"])
    real, calls = pipe.vae.decode, []

    def decode(*args, **kwargs):
        calls.append(pipe.vae.dtype)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(pipe.vae, "decode", decode)
    images, reasons = generator({"1": "a cat"}, ["1"])
    assert (png_bytes(images["1"]), reasons) == (png_bytes(expected["1"]), {})
    assert (calls, pipe.vae.dtype) == ([torch.float32] * 2, torch.float16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "goca"}, "a key of GenerationSettings, but got `methods`: write `method`"),
        ({"method": "gocha"}, "`method` to be one of 'cfg', 'scfg', 'goca'"),
        ({"dtype": "half"}, "`dtype` to be one of"),
        ({"scheduler": "DPM"}, "a scheduler of diffusers"),
        ({"batch": 0}, "`batch` to be a whole number of at least 1"),
        ({"size": 100}, "a multiple of 8"),
        ({"guidance_scale": 0}, "`guidance_scale` to be a finite number above 0"),
    ],
)
def test_mistakes_in_the_file(changes, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(GenerationSettings, changes)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "generate").glob("*.toml")), ids=lambda path: path.stem)
def test_the_files_of_this_repository(path):
    settings, name = GenerationSettings.read(path), path.stem.rpartition("_")
    assert settings.method == name[2]
    for other in path.parent.glob(f"{name[0]}_*.toml"):
        assert {**tomllib.loads(other.read_text()), "method": name[2]} == tomllib.loads(path.read_text())
