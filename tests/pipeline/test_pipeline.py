"""Off equals stock, rate one equals stock, on differs; batches, lives of hooks, saving and loading."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback

from goca_guidance import GoCAConfig, GoCASCFGPipeline, SCFGConfig
from goca_guidance.method.scfg import rate_map
from tests.helpers.guided import NEUTRAL, PROMPTS, assert_clean, hooks_of
from tests.helpers.tiny import generate, stock_of, tiny_components


# ---- stock or not ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kwargs",
    [
        {"use_scfg": False},
        {"guidance_scale": 1.0},
        {"scfg": NEUTRAL},
        {"scfg_stop": 0.0},
        {"scfg": NEUTRAL, "guidance_scale": 20},
    ],
)
@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS])
def test_off_equals_stock_bit_for_bit(pipe, prompt, kwargs):
    stock_kwargs = {k: v for k, v in kwargs.items() if k == "guidance_scale"}
    assert torch.equal(
        generate(pipe, prompt, **kwargs).images, generate(stock_of(pipe), prompt, **stock_kwargs).images
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rate_one_equals_stock_in_half_precision(pipe, dtype):
    pipe.to(dtype=dtype)
    ours, stock = (
        generate(p, output_type="latent", **kw).images for p, kw in ((pipe, {"scfg": NEUTRAL}), (stock_of(pipe), {}))
    )
    assert ours.dtype == dtype
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("segmentor", ["goca", "s-cfg"])
def test_on_differs_and_repeats(pipe, segmentor):
    scfg = SCFGConfig(segmentor=segmentor)
    on = generate(pipe, scfg=scfg).images
    assert not torch.allclose(on, generate(stock_of(pipe)).images, atol=1e-4)
    assert torch.equal(on, generate(pipe, scfg=scfg).images)
    assert_clean(pipe)


def test_rate_reaches_the_scheduler_exactly(pipe):
    """What the scheduler receives, against a float64 recomputation from the raw predictions and the returned regions."""
    raw, received = [], []
    pipe.unet.register_forward_hook(lambda m, a, out: raw.append(out[0].detach().double()))
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda pred, *args, **kwargs: received.append(pred.double()) or step(pred, *args, **kwargs)
    output = generate(pipe, PROMPTS, output_regions=True, output_type="latent")
    for prediction, got, regions, guidance in zip(raw, received, output.regions, output.guidance_maps, strict=True):
        uncond, cond = prediction.chunk(2)
        rate = rate_map((cond - uncond).float(), regions, 5.0, SCFGConfig())
        assert torch.allclose(guidance, 5 * rate, atol=1e-5)
        expected = uncond + 5.0 * rate.double() * (cond - uncond)
        assert (got - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize("segmentor", ["goca", "s-cfg"])
def test_a_batch_of_two_equals_two_batches_of_one(pipe, segmentor):
    """Prompts of different lengths, each with its own regions."""
    scfg = SCFGConfig(segmentor=segmentor)
    both = generate(pipe, PROMPTS, output_type="latent", output_regions=True, scfg=scfg)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(pipe, [prompt], seed=i, output_type="latent", output_regions=True, scfg=scfg)
        # A near tie between two of the random model's regions may fall either way; prompts mixed up would be far off.
        assert (both.images[i] - alone.images[0]).norm() / alone.images.norm() < 1e-3
        assert both.regions[0].labels[i] == alone.regions[0].labels[0]
        k = len(alone.regions[0].labels[0])
        same = (both.regions[0].masks[i, :k] == alone.regions[0].masks[0]).float().mean()
        assert same > 0.99
        assert not both.regions[0].masks[i, k:].any()


def test_images_per_prompt(pipe):
    output = generate(pipe, PROMPTS[0], num_images_per_prompt=2, output_regions=True, generator=torch.Generator())
    assert output.images.shape[0] == output.regions[0].masks.shape[0] == len(output.regions[0].labels) == 2


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (40, 24)])
def test_any_size(pipe, size):
    output = generate(pipe, height=size[0], width=size[1], output_regions=True)
    assert output.regions[0].masks.shape[-2:] == (size[0] // 2, size[1] // 2)
    assert (output.regions[0].masks.sum(1) == 1).all()


def test_start_and_stop(pipe):
    """Only the steps between are guided; what reaches the scheduler in the others is plain guidance."""
    raw, received = [], []
    pipe.unet.register_forward_hook(lambda m, a, out: raw.append(out[0].detach()))
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda pred, *args, **kwargs: received.append(pred) or step(pred, *args, **kwargs)
    output = generate(pipe, num_inference_steps=8, scfg_start=0.25, scfg_stop=0.75, output_regions=True)
    assert len(output.regions) == len(output.guidance_maps) == 4
    plain = []
    for prediction, got in zip(raw, received, strict=True):
        uncond, cond = prediction.chunk(2)
        plain.append(torch.equal(got, uncond + 5.0 * (cond - uncond)))
    assert plain == [True, True, False, False, False, False, True, True]


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_other_schedulers(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    assert torch.equal(generate(pipe, scfg=NEUTRAL).images, generate(stock_of(pipe)).images)


def test_v_prediction_and_linear_projection_like_sd2():
    pipe = GoCASCFGPipeline(**tiny_components(use_linear_projection=True))
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    assert torch.equal(generate(pipe, scfg=NEUTRAL).images, generate(stock_of(pipe)).images)


@pytest.mark.parametrize("config", [GoCAConfig.vanilla(), GoCAConfig.released(), GoCAConfig(drop_stop_words=False)])
def test_configurations_guide(pipe, config):
    output = generate(pipe, goca=config, output_regions=True)
    assert torch.isfinite(output.images).all()
    assert ("a" in output.regions[0].labels[0]) != config.drop_stop_words


# ---- what surrounds it -----------------------------------------------------------------------------------------------
def test_signature_is_the_stock_one_and_ours(pipe):
    """Of the family's class, where help() and tools look."""
    stock, ours = (inspect.signature(c.__call__).parameters for c in (StableDiffusionPipeline, type(pipe)))
    assert [name for name in ours if name in stock] == list(stock)
    added = {name for name in ours if name not in stock}
    switches = {"use_scfg", "scfg_start", "scfg_stop", "output_regions", "output_negative_maps"}
    assert added == {"goca", "scfg", "region_tokens", *switches}
    assert all(
        ours[name].kind is inspect.Parameter.KEYWORD_ONLY and f"{name} (" in type(pipe).__call__.__doc__
        for name in added
    )


def test_output_forms(pipe):
    full = generate(pipe, output_regions=True)
    images, nsfw, regions, maps = generate(pipe, output_regions=True, return_dict=False)
    assert torch.equal(full[0], images)
    assert nsfw is None
    assert torch.equal(maps, full.guidance_maps)
    assert maps.shape == (3, 1, 1, 16, 16)
    assert len(regions) == 3
    assert len(generate(pipe, return_dict=False)) == 2
    plain = generate(pipe, guidance_scale=1.0, output_regions=True)
    assert plain.regions == []
    assert plain.guidance_maps is None


def test_pil_output_and_default_size(pipe):
    image = generate(pipe, output_type="pil").images[0]
    assert image.size == (32, 32)


def test_numpy_output(pipe):
    assert isinstance(generate(pipe, output_type="np").images, np.ndarray)


def test_callback_can_change_the_scale(pipe):
    """A callback that raises `_guidance_scale` is followed, and guidance stays spatial."""

    def raise_scale(p, step, timestep, tensors):
        p._guidance_scale += 1
        return tensors

    output = generate(pipe, callback_on_step_end=raise_scale, output_regions=True, scfg=NEUTRAL)
    assert [m.mean().item() for m in output.guidance_maps] == [5.0, 6.0, 7.0]


def test_guidance_rescale(pipe):
    kwargs = {"guidance_rescale": 0.7}
    assert torch.equal(generate(pipe, scfg=NEUTRAL, **kwargs).images, generate(stock_of(pipe), **kwargs).images)


def test_prompt_embeds_with_named_regions(pipe):
    """Without a text encoder; regions for each prompt, each prompt several images."""
    embeds, negative = pipe.encode_prompt(["a cat on grass", "a dog"], "cpu", 1, True)
    pipe.text_encoder = None
    output = generate(
        pipe,
        None,
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        region_tokens=[{"cat": [2], "grass": [4]}, {"dog": [2]}],
        num_images_per_prompt=2,
        generator=torch.Generator(),
        output_regions=True,
    )
    assert output.regions[0].labels == (("cat", "grass", "<sos>"),) * 2 + (("dog", "<sos>"),) * 2
    assert hooks_of(pipe.unet) == 0


def test_negative_prompt_forms_no_region(pipe):
    output = generate(pipe, "a cat", negative_prompt="a dog on grass", output_regions=True)
    assert output.regions[0].labels == (("cat", "<sos>"),)


def test_cutoff_callback_of_diffusers(pipe):
    """It ends guidance, and the doubled batch, in the middle of a call."""
    cutoff = {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)}
    output = generate(pipe, num_inference_steps=4, output_regions=True, **cutoff)
    assert len(output.regions) == 2
    assert torch.equal(generate(pipe, scfg=NEUTRAL, **cutoff).images, generate(stock_of(pipe), **cutoff).images)


def test_autocast(pipe):
    """Statistics stay float32, and rate one stays stock at a scale that bfloat16 cannot hold."""
    with torch.autocast("cpu", torch.bfloat16):
        ours = generate(pipe, scfg=NEUTRAL, guidance_scale=7.3).images
        assert torch.equal(ours, generate(stock_of(pipe), guidance_scale=7.3).images)
        output = generate(pipe, output_regions=True)
    assert output.guidance_maps.dtype == torch.float32


def test_one_word_of_several_tokens(pipe):
    """Its map is its own attention, not the rounding of a quotient that is constant."""
    regions = generate(pipe, "zebra", output_regions=True, num_inference_steps=1).regions[0]
    tokens = {"zebra": list(range(1, 1 + len(pipe.tokenizer.tokenize("zebra"))))}
    assert len(tokens["zebra"]) > 2
    by_hand = generate(
        pipe, "zebra", region_tokens=tokens, goca=GoCAConfig(rescale=False), output_regions=True, num_inference_steps=1
    )
    assert torch.equal(regions.masks, by_hand.regions[0].masks)


def test_compiled_denoiser(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    generate(pipe, use_scfg=False)  # a warm graph, which would ignore hooks
    assert len(generate(pipe, output_regions=True).regions) == 3


def test_save_and_load(pipe, tmp_path):
    before = generate(pipe).images
    pipe.save_pretrained(tmp_path)
    loaded = GoCASCFGPipeline.from_pretrained(str(tmp_path))
    assert torch.allclose(generate(loaded).images, before, atol=1e-5)
    assert type(loaded) is type(pipe)
    assert isinstance(loaded, StableDiffusionPipeline)
    assert torch.allclose(generate(type(pipe).from_pretrained(str(tmp_path))).images, before, atol=1e-5)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionPipeline
    half = GoCASCFGPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    assert half.unet.dtype == half.text_encoder.dtype == torch.float16


def test_loadable_file(pipe, tmp_path):
    stock_of(pipe).save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline="pipelines/stable_diffusion.py", trust_remote_code=True
    )
    assert torch.allclose(generate(loaded).images, generate(pipe).images, atol=1e-5)


def test_from_pipe_shares_modules_and_their_dtypes(pipe):
    stock = stock_of(pipe)
    stock.unet.half(), stock.text_encoder.bfloat16()
    ours = GoCASCFGPipeline.from_pipe(stock)
    assert ours.unet is stock.unet
    assert (ours.unet.dtype, ours.text_encoder.dtype, ours.vae.dtype) == (torch.float16, torch.bfloat16, torch.float32)
    assert ours.config.requires_safety_checker is False
    other = StableDiffusionImg2ImgPipeline(**stock.components, requires_safety_checker=False)
    ours = GoCASCFGPipeline.from_pipe(other)
    assert isinstance(ours, StableDiffusionImg2ImgPipeline)
    assert not isinstance(ours, StableDiffusionPipeline)
    back = type(pipe).from_pipe(ours)
    assert type(back) is type(pipe)
    assert back.unet is stock.unet
