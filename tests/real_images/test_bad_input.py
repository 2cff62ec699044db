"""What `segment` and `discover` refuse, by kind: wrong types and values, names, pipelines of another kind."""

import math
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

from goca_guidance import Background
from tests.helpers.guided import assert_clean, guided
from tests.helpers.tiny import tiny_components


CLASSES = ["cat", "potted plant"]
TYPES = (TypeError, ValueError)
WRONG = {
    "classes": [[1], 5, "cat", None, [["cat"], 3], {"cat"}, {"cat": 1}],
    "prompt": [5, [1], {}],
    "timestep": ["100", 1.5, math.nan, [1.5], True, {}],
    "num_noises": ["1", 0, 1.5, None, True],
    "generator": [0, "x", [3]],
    "background": ["sky", True, math.nan, math.inf, [1], object()],
    "height": ["32", 0, -8, 32.5, math.nan],
    "goca": [{}, 3],
    "segmentor": [3, "goca"],
}


@pytest.mark.parametrize("argument", WRONG)
def test_segment(pipe, image, argument):
    for value in WRONG[argument]:
        with pytest.raises(TYPES, match=rf"^Expected `{argument}") as told:
            pipe.segment(**{"images": image, "classes": CLASSES, argument: value})
        assert "\n" not in str(told.value)
    assert_clean(pipe)


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("threshold", ["x", math.nan, None]),
        ("alpha", [0, -1, math.inf, "x"]),
        ("timestep", ["50", 1.5, [1]]),
        ("size", [0, 1.5, "x"]),
        ("width", [0, "32"]),
        ("layer", [3, ["a"]]),
    ],
)
def test_discover(pipe, image, argument, values):
    for value in values:
        with pytest.raises(TYPES, match=rf"^Expected `{argument}"):
            pipe.discover(image, **{argument: value})


@pytest.mark.parametrize("images", [5, None, object(), [3], {"a": 1}, True, b"x", [None]])
def test_what_is_no_image(pipe, images):
    with pytest.raises(TypeError, match=r"^Expected an image as a path"):
        pipe.segment(images, CLASSES)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a\x01", b"\xff\xd8\xff\xe0", b"BM" + bytes(60)])
def test_a_file_that_is_no_image(pipe, content, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    for path in (tmp_path / "a.png", tmp_path, tmp_path / "nowhere", "a\0b"):
        with pytest.raises(ValueError, match=r"^Expected a readable image file, but") as told:
            pipe.segment(path, CLASSES)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "array",
    [np.full((9, 9, 3), math.nan), np.full((9, 9, 3), "x"), np.zeros((0, 9, 3)), np.zeros((9, 9, 3), complex),
     np.full((9, 9, 3), None), np.zeros((9, 9, 4))],
)  # fmt: skip
def test_what_is_no_array_of_an_image(pipe, array):
    with pytest.raises(TYPES, match=r"^Expected an? (uint8 )?(array|image)"):
        pipe.segment(array, CLASSES)


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        ({"backgruond": 0.5}, "an argument of segment, but got `backgruond`: write `background`"),
        ({"blur_sigma": 1}, r"write `goca=GoCAConfig\(blur_sigma=...\)`"),
        ({"refine_oder": 1}, r"write `goca=GoCAConfig\(refine_order=...\)`"),
    ],
)
def test_names(pipe, image, wrong, fix):
    with pytest.raises(TypeError, match=fix):
        pipe.segment(image, CLASSES, **wrong)


@pytest.mark.parametrize("name", ["", " ", ",", "\u00a0", "\u2003", "\u200b", "\ufeff", "\t\n", " , \u200d", "\u2028"])
def test_a_name_of_nothing(pipe, image, name):
    for classes, background in ((["cat", name], None), (["cat"], [name])):
        with pytest.raises(ValueError, match="no empty ones"):
            pipe.segment(image, classes, background=background)


def test_numbers_and_names_of_numpy(pipe, image):
    plain = pipe.segment(image, CLASSES, timestep=[50, 100], num_noises=2, background=0.5)
    odd = {"timestep": torch.tensor([50, 100]), "num_noises": np.int64(2), "background": np.float32(0.5)}
    assert torch.equal(pipe.segment(image, np.array(CLASSES), **odd).scores, plain.scores)


def test_another_background(pipe, image):
    result = pipe.segment(image, CLASSES, background=0.5)
    assert replace(result, background=Background.of(0.25)).background == Background(threshold=0.25)
    with pytest.raises(ValueError, match="without entities, because none were segmented, but got sky"):
        replace(result, background=Background.of(["sky"]))
    with pytest.raises(TypeError, match="background"):
        replace(result, background=0.25)


# ---- pipelines of another kind ---------------------------------------------------------------------------------------
def latent_consistency():
    parts = tiny_components(time_cond_proj_dim=32) | {"scheduler": diffusers.LCMScheduler()}
    return diffusers.LatentConsistencyModelPipeline(**parts)


def boxes():
    return diffusers.StableDiffusionGLIGENPipeline(**tiny_components(attention_type="gated"))


def self_attention_guidance():
    return diffusers.StableDiffusionSAGPipeline(**tiny_components())


def depth():
    return diffusers.StableDiffusionLDM3DPipeline(**tiny_components(), image_encoder=None)


def chosen_tokens():
    return diffusers.StableDiffusionAttendAndExcitePipeline(**tiny_components())


def video():
    sizes = {"block_out_channels": (4, 8), "layers_per_block": 1, "attention_head_dim": 4, "norm_num_groups": 2}
    blocks = {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D")}
    blocks["up_block_types"] = ("UpBlock3D", "CrossAttnUpBlock3D")
    unet = diffusers.UNet3DConditionModel(**sizes, **blocks, cross_attention_dim=32)
    parts = {name: part for name, part in tiny_components().items() if name not in ("unet", "feature_extractor")}
    del parts["safety_checker"], parts["requires_safety_checker"]
    return diffusers.TextToVideoSDPipeline(**parts, unet=unet)


def tiny_autoencoder():
    vae = diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4)  # noqa: E501 # fmt: skip
    return diffusers.StableDiffusionPipeline(**tiny_components() | {"vae": vae})


KINDS = [latent_consistency, boxes, self_attention_guidance, depth, chosen_tokens, video, tiny_autoencoder]


@pytest.mark.parametrize("make", KINDS)
def test_a_pipeline_of_another_kind_is_refused(make, image):
    pipe = guided(make())
    for read in (lambda: pipe.segment(image, CLASSES), lambda: pipe.discover(image)):
        with pytest.raises(ValueError, match=r"^Expected a plain text-to-image pipeline of pictures") as told:
            read()
        assert "\n" not in str(told.value)
    assert_clean(pipe)
