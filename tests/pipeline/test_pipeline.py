"""Stable Diffusion, beside the contract of every family: sizes, schedulers, precision, callbacks, loading."""

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
from tests.helpers.guided import NEUTRAL, PROMPTS, hooks_of
from tests.helpers.tiny import generate, stock_of, tiny_components


# ---- stock or not ----------------------------------------------------------------------------------------------------
def test_a_guidance_rule_of_ones_own(pipe):
    """A rate of two at every step is stock at twice the scale; S-CFG's is not asked."""
    pipe.guidance_rule = lambda delta, regions, scale, config: torch.full_like(delta[:, :1], 2)
    doubled = generate(pipe, guidance_scale=3.0, output_type="latent").images
    torch.testing.assert_close(
        doubled, generate(stock_of(pipe), guidance_scale=6.0, output_type="latent").images, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS])
def test_rate_one_equals_stock_at_a_large_scale(pipe, prompt):
    large = {"guidance_scale": 20}
    assert torch.equal(
        generate(pipe, prompt, scfg=NEUTRAL, **large).images, generate(stock_of(pipe), prompt, **large).images
    )


def test_the_segmentor_of_scfg_repeats_itself_and_a_batch_is_its_images(pipe):
    asked = {"output_type": "latent", "output_regions": True, "scfg": SCFGConfig(segmentor="s-cfg")}
    both, again = generate(pipe, PROMPTS, **asked), generate(pipe, PROMPTS, **asked)
    assert torch.equal(both.images, again.images)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(pipe, [prompt], seed=i, **asked)
        # A near tie between two of the random model's regions may fall either way; prompts mixed up would be far off.
        assert (both.images[i] - alone.images[0]).norm() / alone.images.norm() < 1e-3
        assert both.regions[0].labels[i] == alone.regions[0].labels[0]
        k = len(alone.regions[0].labels[0])
        assert (both.regions[0].masks[i, :k] == alone.regions[0].masks[0]).float().mean() > 0.99
        assert not both.regions[0].masks[i, k:].any()


@pytest.mark.parametrize("size", [(48, 32), (40, 24)])
def test_any_size(pipe, size):
    output = generate(pipe, height=size[0], width=size[1], output_regions=True)
    assert output.regions[0].masks.shape[-2:] == (size[0] // 2, size[1] // 2)
    assert (output.regions[0].masks.sum(1) == 1).all()


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


@pytest.mark.parametrize("prompt", ["a cat behind a bus", "((A CAT)), a bus", "it's a cat -- near (the bus:1.2)"])
def test_things_alone_form_regions(pipe, prompt):
    output = generate(pipe, prompt, output_regions=True)
    assert [label.lower() for label in output.regions[0].labels[0]] == ["cat", "bus", "<sos>"]


# ---- what surrounds it -----------------------------------------------------------------------------------------------
def test_nothing_guided_has_no_regions(pipe):
    plain = generate(pipe, guidance_scale=1.0, output_regions=True)
    assert plain.regions == []
    assert plain.guidance_maps is None


def test_pil_output_and_default_size(pipe):
    image = generate(pipe, output_type="pil").images[0]
    assert image.size == (32, 32)


def test_guidance_rescale(pipe):
    kwargs = {"guidance_rescale": 0.7}
    assert torch.equal(generate(pipe, scfg=NEUTRAL, **kwargs).images, generate(stock_of(pipe), **kwargs).images)


def test_prompt_embeds_with_named_regions(pipe):
    """Without a text encoder and a tokenizer; regions for each prompt, each prompt several images."""
    embeds, negative = pipe.encode_prompt(["a cat on grass", "a dog"], "cpu", 1, True)
    pipe.text_encoder = pipe.tokenizer = None
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
