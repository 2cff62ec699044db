"""Rows of the table of features: tasks, and the ways to load a pipeline."""

import tempfile
from unittest.mock import patch

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.guiders import ClassifierFreeGuidance
from PIL import Image

from goca_guidance import GoCAGuidance, GoCASCFGPipeline, SCFGConfig
from tests.features.checks import (
    ABSENT,
    WORKS,
    feature,
    like_denoiser,
    plain,
    refused,
    silent,
    variant,
    works,
)
from tests.helpers.families import FAMILIES, controlnet, image_to_image, inpaint, run, stock_pipeline
from tests.helpers.guided import NEUTRAL, PROMPT, guided
from tests.helpers.places import ROOT


FILES = {  # of `pipelines/`, where the name is not the family's with an underscore
    "sd": "stable_diffusion",
    "sdxl": "stable_diffusion_xl",
    "sd3": "stable_diffusion_3",
    "hunyuan": "hunyuandit",
}


@feature("Text to image")
def text_to_image(name):
    return works(name, visible=False)


def _task(name, kind, build):
    if (found := build(name)) is None:
        stem = FAMILIES[name].stock.__name__.removesuffix("Pipeline").lower()
        assert not [p for p in dir(diffusers) if p.lower().startswith(stem + kind.lower())]
        return ABSENT
    return works(name, stock=found[0], **found[1])


@feature("Image to image")
def image_to_image_(name):
    return _task(name, "Img2Img", image_to_image)


@feature("Inpainting")
def inpainting(name):
    """Stable Diffusion's own inpainting checkpoints, of nine channels, too."""
    if FAMILIES[name].denoiser == "unet":
        works(name, stock=variant(name, "Inpaint", **like_denoiser(name, in_channels=9)), **inpaint(name)[1])
    return _task(name, "Inpaint", inpaint)


@feature("ControlNet")
def controlnet_(name):
    return _task(name, "ControlNet", controlnet)


@feature("A second picture in the prompt (InstructPix2Pix, Kontext)")
def second_picture(name):
    unet = FAMILIES[name].denoiser == "unet"
    kind, changes = ("InstructPix2Pix", like_denoiser(name, in_channels=8)) if unet else ("Kontext", {})
    if (stock := variant(name, kind, **changes)) is None:
        return ABSENT
    if not unet:
        call = {"image": _picture(), "max_area": 32 * 32, "_auto_resize": False}
        return works(name, stock=stock, alone=False, **call)  # the other picture's tokens are projected too
    with patch.dict(FAMILIES[name].call):
        del FAMILIES[name].call["height"], FAMILIES[name].call["width"]  # the picture's
        reason = "three predictions are mixed; `use_scfg=False`"
        return refused(name, "a batch of 3", reason, stock=stock, image=_picture())


def _picture(side=32):
    return Image.effect_mandelbrot((side, side), (-2, -1.5, 1, 1.5), 50).convert("RGB")


@feature("Segmentation of real images")
def segmentation(name):
    """Repeatable, and generation is as before."""
    pipe, side = guided(stock_pipeline(name)), FAMILIES[name].call["height"]
    size = {"height": side, "width": side}
    first, again = (pipe.segment([_picture(), _picture(48)], ["cat", "grass"], **size) for _ in range(2))
    assert torch.equal(first.scores, again.scores)
    assert [tuple(labels.shape) for labels in first.label_maps] == [(32, 32), (48, 48)]
    assert all(scores.min() == 0 and scores.max() == 1 for scores in first.scores.flatten(0, 1))
    assert torch.equal(run(pipe, name, scfg=NEUTRAL).images, plain(name))
    return WORKS


@feature("Save and load")
def save_and_load(name):
    """Ours loads what stock saved, and what ours saves loads as stock."""
    with tempfile.TemporaryDirectory() as folder:
        stock_pipeline(name).save_pretrained(folder)
        ours = silent(GoCASCFGPipeline.from_pretrained(folder))
        _assert_loaded(ours, name)
        ours.save_pretrained(folder)
        stock = silent(DiffusionPipeline.from_pretrained(folder))
    assert type(stock) is FAMILIES[name].stock
    return works(name, stock=stock, visible=False)


@feature("Loadable file (`custom_pipeline=`)")
def loadable_file(name):
    file = ROOT / "pipelines" / f"{FILES.get(name, name.replace('-', '_'))}.py"
    with tempfile.TemporaryDirectory() as folder:
        stock_pipeline(name).save_pretrained(folder)
        ours = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(file), trust_remote_code=True)
    _assert_loaded(silent(ours), name)
    return WORKS


def _assert_loaded(ours, name):
    """A loaded tensor may lie otherwise in memory, which moves the last bits."""
    assert isinstance(ours, GoCASCFGPipeline)
    assert isinstance(ours, FAMILIES[name].stock)
    neutral, guided = run(ours, name, scfg=NEUTRAL).images, run(ours, name, output_regions=True)
    assert torch.allclose(neutral, plain(name), atol=1e-4)
    assert not torch.allclose(guided.images, neutral, atol=1e-4)
    assert len(guided.regions) == 2


@feature("Modular pipeline (`GoCAGuidance`)")
def modular(name):
    blocks = getattr(diffusers, FAMILIES[name].stock.__name__.removesuffix("Pipeline") + "AutoBlocks", None)
    if blocks is None or "guider" not in [part.name for part in blocks().expected_components]:
        return ABSENT
    pipe, components = blocks().init_pipeline(), stock_pipeline(name).components
    wanted = {part.name for part in blocks().expected_components}
    pipe.update_components(**{n: part for n, part in components.items() if n in wanted and part is not None})
    expected = _run_modular(pipe, name, ClassifierFreeGuidance(5.0))
    for scfg in (NEUTRAL, SCFGConfig()):
        guider = GoCAGuidance(5.0, scfg=scfg)
        pipe.update_components(guider=guider)
        with guider.watching(pipe, keep_regions=True) as seen:
            assert torch.equal(_run_modular(pipe, name, guider), expected) == (scfg == NEUTRAL)
        assert len(seen.results()[0]) == 2
    return WORKS


def _run_modular(pipe, name, guider):
    silent(pipe).update_components(guider=guider)
    known = {value.name for value in pipe.blocks.inputs}
    call = {key: value for key, value in FAMILIES[name].call.items() if key in known}
    call |= {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    return pipe(prompt=PROMPT, negative_prompt="", output="latents", **call)
