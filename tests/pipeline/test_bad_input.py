"""What every door of a pipeline refuses, by kind: wrong types and values, unknown names, classes that are not ours."""

import copy
import math
import pickle

import diffusers
import numpy as np
import pytest
import torch

from goca_guidance import GoCAGuidance, GoCASCFGPipeline
from goca_guidance.pipeline import guided as guided_class
from tests.helpers.families import FAMILIES, run, stock_pipeline
from tests.helpers.guided import assert_clean, guided
from tests.helpers.tiny import generate, stock_of, tiny_components


NAN, INF = math.nan, math.inf
LIKELY = ["sd", "pixart-sigma", "flux", "sd3"]
TYPES = (TypeError, ValueError)


# ---- arguments of a call ---------------------------------------------------------------------------------------------
WRONG = {  # by argument, ours and stock's
    "use_scfg": [1, None, "no"],
    "goca": [{}, "goca", 3],
    "scfg": [True, {}],
    "scfg_start": [None, "0", NAN, -0.1, 1.5, True],
    "scfg_stop": [None, INF, 2],
    "region_tokens": [5, "cat", {"cat": 2}, {"cat": [1.5]}, {3: [1]}, [{"cat": "x"}], {"cat": np.array([0.5])}],
    "output_regions": [1, "yes"],
    "output_negative_maps": [None],
    "prompt": [5, ["a cat", 3], [], {"a": 1}],
    "negative_prompt": [3, [], {}],
    "num_inference_steps": [0, -1, 2.5, "3", None, True, NAN],
    "height": [-8, 0, "32", [32], NAN, INF],
    "num_images_per_prompt": [0, -1, "2", 1.5, None],
    "generator": [0, "x", [3]],
    "latents": ["x", [], np.zeros((1, 4, 16, 16)), torch.full((1, 4, 16, 16), NAN), torch.zeros(1, 3, 16, 16),
                torch.zeros(4, 16, 16), torch.zeros(2, 4, 16, 16)],
}  # fmt: skip
OF_SOME = {
    "guidance_scale": ["7", None, INF, NAN, -INF, [7]],
    "true_cfg_scale": ["7", None, INF, NAN],
    "guidance_rescale": ["x", None, NAN],
    "eta": ["x", NAN],
    "clip_skip": ["x", -5],
    "max_sequence_length": ["x", -1, 0, 1.5],
    "callback_on_step_end": [3, "x"],
    "callback_on_step_end_tensor_inputs": [3],
    "cross_attention_kwargs": [3, "x"],
    "sigmas": ["x", [], [NAN]],
}


@pytest.mark.parametrize("name", LIKELY)
def test_no_wrong_argument_reaches_the_loop(name):
    pipe, forwards = guided(stock_pipeline(name)), []
    denoiser = getattr(pipe, FAMILIES[name].denoiser)
    handle = denoiser.register_forward_pre_hook(lambda *_: forwards.append(1))
    known = pipe.__call__.__signature__.parameters
    for argument, values in {**WRONG, **OF_SOME}.items():
        for value in values if argument in known else ():
            changes = {argument: value} | ({"width": 32} if argument == "height" else {})
            with pytest.raises(TYPES, match=rf"^Expected `{argument}") as told:
                run(pipe, name, **changes)
            assert "\n" not in str(told.value)
    handle.remove()
    assert forwards == []
    assert_clean(pipe)


@pytest.mark.parametrize("call", [lambda p: p(5), lambda p: p.words(["a"]), lambda p: p.words(None)])
def test_a_prompt_that_is_no_text(pipe, call):
    with pytest.raises(TypeError, match="Expected `prompt` to be a text"):
        call(pipe)


def test_off_is_stock_with_its_own_mistakes(pipe):
    odd = {"guidance_scale": torch.tensor([5.0]), "height": 32.0, "width": 32.0}
    assert torch.equal(generate(pipe, use_scfg=False, **odd).images, generate(stock_of(pipe), **odd).images)
    with pytest.raises(TypeError, match="not supported between"):
        generate(pipe, use_scfg=False, guidance_scale="7")


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple, lambda at: [np.int64(p) for p in at]])
def test_positions_of_every_kind(pipe, kind):
    wanted = generate(pipe, region_tokens={"cat": [2], "grass": [4, 5]}).images
    assert torch.equal(generate(pipe, region_tokens={"cat": kind([2]), "grass": kind([4, 5])}).images, wanted)


def test_numbers_of_numpy(pipe):
    numbers = {"num_inference_steps": np.int64(3), "guidance_scale": np.float32(5), "scfg_stop": np.float64(1)}
    assert torch.equal(generate(pipe, **numbers).images, generate(pipe).images)


# ---- names -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        ({"output_region": True}, "write `output_regions`"),
        ({"use_scgf": False}, "write `use_scfg`"),
        ({"scfg_end": 0.5}, "write `scfg"),
        ({"region_token": {}}, "write `region_tokens`"),
        ({"negative_maps": True}, "write `output_negative_maps`"),
        ({"rate_min": 1}, r"write `scfg=SCFGConfig\(rate_min=...\)`"),
        ({"blur_sigm": 1}, r"write `goca=GoCAConfig\(blur_sigma=...\)`"),
    ],
)
def test_a_name_that_stock_would_swallow(pipe, wrong, fix):
    """Stable Diffusion takes any name."""
    (name,) = wrong
    with pytest.raises(TypeError, match=f"^Expected an argument of StableDiffusionPipeline, but got `{name}`: {fix}"):
        generate(pipe, **wrong)


def test_what_stock_takes_besides_its_arguments_passes(pipe):
    seen = []
    generate(pipe, callback=lambda *_: seen.append(1), callback_steps=1, anything="else")
    assert len(seen) == 3


def test_a_name_that_stock_does_not_take():
    flux = guided(stock_pipeline("flux"))
    with pytest.raises(
        TypeError, match="Expected an argument of FluxPipeline, but got `num_inference_step`: write `num_inf"
    ):
        flux("a cat", num_inference_step=3)
    with pytest.raises(TypeError, match=r"write `scfg=SCFGConfig\(ceiling=...\)`"):
        flux("a cat", ceiling=3)
    with pytest.raises(TypeError, match="Expected the arguments of FluxPipeline, but got: too many positional"):
        flux(*range(50))


# ---- classes ---------------------------------------------------------------------------------------------------------
def test_automatic_pipelines_stay_guided(pipe):
    """They look for classes by name."""
    image = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(image) is guided_class(diffusers.StableDiffusionImg2ImgPipeline)
    assert (
        type(diffusers.AutoPipelineForInpainting.from_pipe(image)).__mro__[2]
        is diffusers.StableDiffusionInpaintPipeline
    )
    assert type(diffusers.AutoPipelineForText2Image.from_pipe(image)) is type(pipe)
    again = diffusers.AutoPipelineForText2Image.from_pipe(stock_of(pipe))
    assert type(again) is diffusers.StableDiffusionPipeline


def test_a_stock_class_gives_a_stock_pipeline(pipe):
    assert type(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)) is diffusers.StableDiffusionImg2ImgPipeline
    assert type(pipe)._get_signature_types() == diffusers.StableDiffusionPipeline._get_signature_types()


class Own(diffusers.StableDiffusionPipeline):
    """A user's pipeline."""


def test_a_users_class_is_copied_and_pickled(pipe):
    own = GoCASCFGPipeline.from_pipe(Own(**pipe.components, requires_safety_checker=False))
    own.set_progress_bar_config(disable=True)
    wanted = generate(pipe).images
    for again in (copy.copy(own), copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert type(again) is type(own)
        assert torch.equal(generate(again).images, wanted)


CUSTOM = """
from diffusers import StableDiffusionPipeline


class MyPipe(StableDiffusionPipeline):
    pass
"""


@pytest.mark.parametrize("door", [lambda pipe: GoCASCFGPipeline, type])
def test_a_custom_pipeline_is_guided(pipe, door, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "mypipe.py").write_text(CUSTOM)
    loaded = door(pipe).from_pretrained(
        tmp_path / "model", custom_pipeline=str(tmp_path / "mypipe.py"), trust_remote_code=True
    )
    assert isinstance(loaded, GoCASCFGPipeline)
    assert type(loaded).__mro__[2].__name__ == "MyPipe"
    loaded.set_progress_bar_config(disable=True)
    assert generate(loaded, output_regions=True).regions


def test_an_output_of_another_kind_has_the_regions_too():
    parts = tiny_components()
    config = {key: value for key, value in parts["vae"].config.items() if not key.startswith("_")}
    vae = diffusers.AutoencoderKL(**config | {"in_channels": 6, "out_channels": 6}).eval()
    pipe = guided(diffusers.StableDiffusionLDM3DPipeline(**parts | {"vae": vae}, image_encoder=None))
    output = generate(pipe, output_type="np", output_regions=True)
    assert output.depth is not None
    assert len(output.regions) == 3
    assert len(generate(pipe, output_type="np", output_regions=True, return_dict=False)) == 5  # rgb, depth, nsfw


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: GoCASCFGPipeline.from_pipe(5), "Expected a loaded pipeline, but got 5"),
        (lambda p: GoCASCFGPipeline.from_pipe("a/repository"), "use `from_pretrained`"),
        (lambda p: GoCASCFGPipeline.from_pretrained(5), "Expected `pretrained_model_name_or_path` to be a text"),
        (lambda p: GoCASCFGPipeline.from_pipe(p, vea=None), "of StableDiffusionPipeline, but got `vea`: write `vae`"),
        (lambda p: GoCASCFGPipeline.from_pipe(p, use_scfg=False), "but got `use_scfg`: known are"),
        (lambda p: GoCAGuidance(guidance_scale="7"), "Expected `guidance_scale` to be a finite number"),
        (lambda p: GoCAGuidance(guidance_scale=NAN), "Expected `guidance_scale` to be a finite number"),
        (lambda p: GoCAGuidance(start=2.0), "Expected `start` to be a finite number from 0 to 1"),
        (lambda p: GoCAGuidance(goca={"blur_sgima": 1}), "a field of GoCAConfig, but got `blur_sgima`: write `blur_sigma`"),
        (lambda p: GoCAGuidance(blur_sigma=1), r"write `goca=GoCAConfig\(blur_sigma=...\)`"),
        (lambda p: GoCAGuidance(region_tokens={"cat": 2}), r"Expected `region_tokens\['cat'\]`.*use \[2\]"),
        (lambda p: GoCAGuidance().watching(p, keep_regions=1), "Expected `keep_regions` to be True or False"),
    ],
)  # fmt: skip
def test_other_doors(pipe, call, message):
    with pytest.raises(TYPES, match=message):
        call(pipe)


# ---- advice that can be followed -------------------------------------------------------------------------------------
def test_a_denoiser_without_layers_is_refused_without_advice_for_a_call():
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    plain = {
        "unet": diffusers.UNet2DConditionModel(block_out_channels=(32, 32), mid_block_type="UNetMidBlock2D", **blocks)
    }
    stock = diffusers.StableDiffusionPipeline(**tiny_components() | plain)
    with pytest.raises(ValueError, match="cross-attention") as told:
        GoCASCFGPipeline.from_pipe(stock)
    assert "use_scfg" not in str(told.value)
    pipe = GoCASCFGPipeline(**tiny_components())
    pipe.unet = plain["unet"]
    with pytest.raises(ValueError, match=r"cross-attention.*Or pass `use_scfg=False`\.$"):
        generate(pipe)


def test_hidden_attention_gives_advice_for_each_door(pipe, image):
    pipe.enable_attention_slicing(1)
    with pytest.raises(RuntimeError, match=r"disable_attention_slicing.*Or pass `use_scfg=False`\.$"):
        generate(pipe)
    with pytest.raises(RuntimeError, match="disable_attention_slicing") as told:
        pipe.segment(image, ["cat", "dog"])
    assert "use_scfg" not in str(told.value)


# ---- what is not finite ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("output_type", ["pil", "pt"])
def test_a_picture_that_is_not_finite_is_told(pipe, output_type):
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.weight, NAN)
    with pytest.raises(ValueError, match="Expected a finite picture, but the autoencoder gave NaN"):
        generate(pipe, output_type=output_type)
    assert_clean(pipe)
    generate(pipe, output_type="latent")


def test_one_empty_prompt_of_many_is_numbered(pipe):
    with pytest.raises(ValueError, match="prompt 1"):
        generate(pipe, ["a cat", ""])


def test_a_generic_preset_is_told_once(caplog):
    parts = tiny_components()
    stock = diffusers.TextToVideoSDPipeline(
        **{name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")},
        unet=diffusers.UNet3DConditionModel(
            block_out_channels=(4, 8), layers_per_block=1, cross_attention_dim=32, attention_head_dim=4, norm_num_groups=2,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        ),
    )  # fmt: skip
    for _ in range(3):
        with pytest.raises(ValueError, match="image latents of shape b c H W"):
            guided(stock)("a cat", num_inference_steps=1, num_frames=1, height=32, width=32)
    told = [record for record in caplog.records if "No preset is known for UNet3D" in record.getMessage()]
    assert len(told) <= 1
