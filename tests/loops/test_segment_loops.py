"""Segmentation through today's autoencoders, and of models whose guidance is distilled: one prediction is enough."""

import pytest
import torch
from PIL import Image

from goca_guidance.denoisers.adapters import denoiser_of
from goca_guidance.real_images.noising import encode
from tests.helpers.guided import assert_clean, guided
from tests.helpers.loops.every import LOOPS
from tests.helpers.loops.tiny_loop import build
from tests.loops.table import further


SEGMENTED = (  # autoencoders of Qwen-Image, Flux.2 (klein, and dev, which is distilled), Sana, Flux.1 and Stable Diffusion
    *(
        "QwenImage",
        "Krea2",
        "Flux2Klein",
        "Flux2",
        "ErnieImage",
        "Sana",
        "ZImage",
        "Chroma",
        "LongCatImage",
        "Bria",
        "AuraFlow",
    ),
)
PICTURE = Image.effect_mandelbrot((48, 32), (-2, -1.5, 1, 1.5), 50).convert("RGB")


def segment(pipe, name: str, pictures, **kwargs):
    size = {"height": 64, "width": 64} if "height" in LOOPS[name].call else {}
    return pipe.segment(pictures, ["cat", "grass"], **size, **further(pipe, name), **kwargs)


@pytest.mark.parametrize("name", SEGMENTED)
def test_pictures_are_segmented(name):
    """One forward of two pictures; repeatable; each as if it were alone; nothing is left behind."""
    name = f"{name}Pipeline"
    pipe, forwards = guided(build(name, LOOPS[name])), []
    hook = denoiser_of(pipe.components).register_forward_hook(lambda *_: forwards.append(1))
    found = segment(pipe, name, [PICTURE, PICTURE.rotate(90)])
    hook.remove()
    assert len(forwards) == 1
    assert [tuple(labels.shape) for labels in found.label_maps] == [(32, 48)] * 2
    assert found.scores.std() > 0.05
    assert torch.equal(segment(pipe, name, [PICTURE, PICTURE.rotate(90)]).scores, found.scores)
    alone = segment(pipe, name, PICTURE.rotate(90), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(alone.scores, found.scores[1:], atol=1e-3, rtol=0)
    assert_clean(pipe)


def test_qwens_latents_have_the_mean_and_deviation_of_each_channel():
    pipe = build("QwenImagePipeline", LOOPS["QwenImagePipeline"])
    pixels = pipe.image_processor.preprocess(PICTURE, height=32, width=32)[:, :, None]
    mean, deviation = (
        torch.tensor(pipe.vae.config[f"latents_{name}"])[:, None, None, None] for name in ("mean", "std")
    )
    expected = (pipe.vae.encode(pixels).latent_dist.mode() - mean) / deviation
    torch.testing.assert_close(encode(pipe, [PICTURE], 32, 32, torch.float32), expected[:, :, 0])


def test_latents_of_flux_2_are_those_of_its_own_encoder():
    pipe = build("Flux2KleinPipeline", LOOPS["Flux2KleinPipeline"])
    pixels = pipe.image_processor.preprocess(PICTURE, height=32, width=32)
    expected = pipe._encode_vae_image(pixels, generator=None)
    torch.testing.assert_close(encode(pipe, [PICTURE], 32, 32, torch.float32), expected, atol=1e-5, rtol=1e-5)


def test_an_argument_that_no_forward_takes_is_refused():
    pipe = guided(build("ChromaPipeline", LOOPS["ChromaPipeline"]))
    with pytest.raises(TypeError, match="an argument of segment, but got `num_inference_steps`"):
        pipe.segment(PICTURE, ["cat", "grass"], num_inference_steps=4)
    short = pipe.segment(PICTURE, ["cat", "grass"], height=32, width=32, max_sequence_length=8)
    assert short.scores.shape[1] == 2
