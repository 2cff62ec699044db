"""Every mistake says what was expected, and nothing is left behind by one, or by an interruption."""

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DConditionModel

from goca_guidance import GoCASCFGPipeline
from tests.helpers.guided import NEUTRAL, assert_clean
from tests.helpers.tiny import generate, stock_of


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt": ""}, "at least one word"),
        ({"height": 33, "width": 32}, "divisible by 8"),
        ({"scfg_start": 0.5, "scfg_stop": 0.2}, "scfg_start"),
        ({"region_tokens": {"cat": [77]}}, "positions from 0 to 23"),
        ({"prompt": None}, "Expected `prompt` or"),
        ({"latents": torch.full((1, 4, 16, 16), torch.nan)}, "Expected `latents` to be a finite Tensor"),
    ],
)
def test_bad_input(pipe, kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        generate(pipe, **kwargs)
    assert_clean(pipe)


def test_prompt_embeds_without_tokens(pipe):
    embeds, negative = pipe.encode_prompt("a cat", "cpu", 1, True)
    kwargs = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    with pytest.raises(ValueError, match="region_tokens"):
        generate(pipe, None, **kwargs)
    assert torch.equal(
        generate(pipe, None, use_scfg=False, **kwargs).images, generate(stock_of(pipe), None, **kwargs).images
    )


def test_a_prompt_longer_than_the_encoder_is_cut_as_stock_cuts_it(pipe):
    prompt = "a cat on grass " + "and a dog " * 20
    output = generate(pipe, prompt, output_regions=True)
    assert output.regions[0].labels[0].count("dog") == 6  # what 24 tokens hold of them
    assert torch.equal(generate(pipe, prompt, scfg=NEUTRAL).images, generate(stock_of(pipe), prompt).images)


def test_hidden_attention(pipe):
    pipe.enable_attention_slicing(1)
    with pytest.raises(RuntimeError, match="disable_attention_slicing"):
        generate(pipe)
    assert_clean(pipe)
    pipe.disable_attention_slicing()
    generate(pipe)


def test_a_prediction_that_is_not_finite(pipe):
    def spoil(module, args, output):
        return (output[0] * torch.nan,)

    handle = pipe.unet.register_forward_hook(spoil)
    with pytest.raises(ValueError, match="Expected finite predictions"):
        generate(pipe, output_type="latent")
    handle.remove()
    assert_clean(pipe)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_after_an_interruption(pipe, error):
    before = generate(pipe).images

    def interrupt(p, step, timestep, tensors):
        raise error

    with pytest.raises(error):
        generate(pipe, callback_on_step_end=interrupt)
    assert_clean(pipe)
    assert torch.equal(generate(pipe).images, before)


def test_other_pipelines_are_refused(pipe):
    components = {k: v for k, v in pipe.components.items() if k not in ("unet", "text_encoder")}
    other = type("Other", (), {"components": components, "config": {}})()
    with pytest.raises(
        ValueError, match="Expected a `unet` or a `transformer` among the components, but got feature_ext"
    ):
        GoCASCFGPipeline.from_pipe(other)
    with pytest.raises(ValueError, match="of StableDiffusionPipeline, but Other has no text_encoder, unet"):
        type(pipe).from_pipe(other)
    with pytest.raises(ValueError, match=r"two predictions by a `guidance_scale`.*but DDPMPipeline is none"):
        GoCASCFGPipeline.from_pipe(DDPMPipeline(pipe.unet, pipe.scheduler))


def test_a_unet_without_text_is_refused(pipe):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    pipe.unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 32), mid_block_type="UNetMidBlock2D", **blocks
    )
    with pytest.raises(ValueError, match="cross-attention"):
        generate(pipe)
