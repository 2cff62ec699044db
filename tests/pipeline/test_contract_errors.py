"""What the pipelines of every family refuse, and what is left after an error: nothing."""

import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import diffusers
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from PIL import Image

from goca_guidance import GoCAConfig, GoCASCFGPipeline
from goca_guidance.denoisers.adapters import denoiser_of
from goca_guidance.method.records import AttentionRecord
from goca_guidance.method.segmentor import GoCASegmentor
from tests.helpers.families import FAMILIES, MAX_TOKENS, run, stock_pipeline
from tests.helpers.guided import (
    NEUTRAL,
    PROMPT,
    PROMPTS,
    STEP_CALLBACK,
    assert_clean,
    every_family,
    guided,
    latents,
    pair,
)
from tests.helpers.tiny import tiny_components


# ---- nothing is left -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])  # torch's hooks see the former only
@every_family
def test_nothing_is_left_after_an_error_in_the_denoiser(name, error):
    ours = guided(stock_pipeline(name))
    before, calls = latents(ours, name), []
    last = [m for n, m in denoiser_of(ours.components).named_modules() if n.endswith("to_out.0")][-1]

    def fail(module, args):
        calls.append(module)
        if len(calls) == (
            2 if name == "sd3" else 3
        ):  # in the second step: heads are uniform there, and nothing is probed
            raise error("a full memory")

    hook = last.register_forward_pre_hook(fail)
    with pytest.raises(error, match="a full memory"):
        run(ours, name)
    hook.remove()
    assert_clean(ours)
    assert torch.equal(latents(ours, name), before)


@every_family
def test_an_error_lets_go_of_all_records_at_once(name):
    """Who ran out of memory must not wait for the garbage collector."""
    ours = guided(stock_pipeline(name))
    last = [m for n, m in denoiser_of(ours.components).named_modules() if n.endswith("to_out.0")][-1]

    def fail(module, args):
        raise RuntimeError("a full memory")

    def alive():
        return sum(type(found) in (AttentionRecord, GoCASegmentor) for found in gc.get_objects())

    hook = last.register_forward_pre_hook(fail)
    gc.collect()
    gc.disable()
    try:
        before = alive()
        with suppress(RuntimeError):
            run(ours, name)
        assert alive() == before
    finally:
        gc.enable()
        hook.remove()


@every_family
def test_heads_are_weighed_under_autocast(name):
    """Norms may leave queries in float32 while outputs are bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        images = latents(guided(stock_pipeline(name)), name, goca=GoCAConfig(heads="contribution"))
    assert torch.isfinite(images).all()


@every_family
def test_nothing_is_left_after_an_interruption(name):
    ours = guided(stock_pipeline(name))

    def interrupt(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(ours, name, **{"callback_on_step_end" if name in STEP_CALLBACK else "callback": interrupt})
    assert_clean(ours)


# ---- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "at least one word"),
        ({"prompt": None}, "Expected `prompt` or"),
        ({"region_tokens": {"cat": [10_000], "</s>": [0]}}, "token positions from 0 to"),
        ({"scfg_start": 0.5, "scfg_stop": 0.2}, "scfg_start"),
        ({"negative_prompt": "", "output_negative_maps": True}, "negative_prompt"),
    ],
)
@every_family
def test_bad_input(name, changes, message):
    ours = guided(stock_pipeline(name))
    with pytest.raises(ValueError, match=message):
        run(ours, name, **changes)
    assert_clean(ours)


def test_flux_makes_one_prediction_without_a_negative_prompt():
    stock, ours = pair("flux")
    with pytest.raises(ValueError, match=r'pass `negative_prompt=""` and a `true_cfg_scale` above 1'):
        run(ours, "flux", negative_prompt=None)
    with pytest.raises(ValueError, match=r'pass `negative_prompt=""` and a `true_cfg_scale` above 1'):
        ours(PROMPT)
    distilled = {"negative_prompt": None, "true_cfg_scale": 1.0, "guidance_scale": 3.5}
    assert torch.equal(latents(ours, "flux", **distilled), latents(stock, "flux", **distilled))


def test_a_cache_is_refused():
    stock, ours = pair("flux")
    before = latents(ours, "flux")
    ours.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="disable_cache"):
        run(ours, "flux")
    assert torch.equal(latents(ours, "flux", use_scfg=False), latents(stock, "flux"))
    ours.transformer.disable_cache()
    assert torch.equal(latents(ours, "flux"), before)


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart-sigma", "sd3", "hunyuan"])
def test_perturbed_attention_guidance_is_refused(name):
    """Before its processors are in place, which it would leave behind."""
    layers = ["mid"] if name.startswith("sd") and name != "sd3" else ["blocks.1"]
    plain = FAMILIES[name].stock.__name__.replace("Pipeline", "PAGPipeline")
    stock = getattr(diffusers, plain)(**FAMILIES[name].components(), pag_applied_layers=layers)
    stock.set_progress_bar_config(disable=True)
    ours, before = guided(stock), set(map(id, denoiser_of(stock.components).attn_processors.values()))
    with pytest.raises(ValueError, match="pag_scale=0"):
        run(ours, name)
    assert set(map(id, denoiser_of(ours.components).attn_processors.values())) == before
    assert torch.equal(latents(ours, name, use_scfg=False), latents(stock, name))
    assert torch.equal(latents(ours, name, pag_scale=0.0, scfg=NEUTRAL), latents(stock, name, pag_scale=0.0))


def test_a_latent_consistency_model_mixes_nothing():
    parts = tiny_components(time_cond_proj_dim=32) | {"scheduler": diffusers.LCMScheduler()}
    stock = diffusers.LatentConsistencyModelPipeline(**parts)
    stock.set_progress_bar_config(disable=True)
    output = run(guided(stock), "sd", output_regions=True)
    assert torch.equal(output.images, latents(stock, "sd"))
    assert output.regions == []


def test_a_distilled_pipeline_that_mixes_nothing_is_refused():
    """At its first prediction, and not after the loop."""
    parts = FAMILIES["flux"].components()
    config = {key: value for key, value in parts["transformer"].config.items() if not key.startswith("_")}
    config |= {"in_channels": 48, "out_channels": 16}  # latents, picture and mask
    stock = diffusers.FluxFillPipeline(**parts | {"transformer": diffusers.FluxTransformer2DModel(**config)})
    stock.set_progress_bar_config(disable=True)
    ours, steps, picture = guided(stock), [], Image.new("RGB", (32, 32))
    small = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": MAX_TOKENS}
    given = {"image": picture, "mask_image": picture.convert("L"), "output_type": "latent", **small}
    with pytest.raises(ValueError, match="use_scfg=False"):
        ours(PROMPT, **given, callback_on_step_end=lambda *step: steps.append(step) or {})
    assert steps == []
    assert_clean(ours)
    assert torch.isfinite(ours(PROMPT, **given, use_scfg=False).images).all()
    plain = [
        pipe(PROMPT, **given, guidance_scale=1.0, generator=torch.Generator().manual_seed(0)) for pipe in (stock, ours)
    ]
    assert torch.equal(plain[0].images, plain[1].images)  # a scale of one guides nothing


def test_a_pipeline_of_another_kind_is_refused():
    unconditional = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(block_out_channels=(32,) * 4), diffusers.DDPMScheduler()
    )
    with pytest.raises(ValueError, match="but DDPMPipeline is none"):
        GoCASCFGPipeline.from_pipe(unconditional)


def test_a_subclass_may_have_its_own_call():
    class Own(GoCASCFGPipeline, diffusers.StableDiffusionPipeline):
        def __call__(self, *args, **kwargs):
            return "mine", super().__call__(*args, **kwargs)

    stock = stock_pipeline("sd")
    mine, output = Own.from_pipe(stock)("a cat", num_inference_steps=1, output_type="latent", output_regions=True)
    assert mine == "mine"
    assert len(output.regions) == 1


@every_family
def test_pickle(name):
    """By the class's name, which is made where it is asked for."""
    pipe = guided(stock_pipeline(name))
    again = pickle.loads(pickle.dumps(pipe))
    assert type(again) is type(pipe)
    assert torch.equal(run(again, name).images, run(pipe, name).images)


def test_products_of_a_callback_count_no_steps():
    """A callback may multiply by the scale, which is spatial for the loop only."""

    def product(pipe, step, timestep, tensors):
        tensors["latents"] = tensors["latents"] + 0 * (pipe.guidance_scale * tensors["latents"])
        return tensors

    pipe = guided(stock_pipeline("sd"))
    output = run(pipe, "sd", num_inference_steps=4, callback_on_step_end=product, output_regions=True, scfg_stop=0.5)
    assert len(output.regions) == 2


def test_two_threads_on_two_pipelines():
    """Kernels of one are no attention of the other, and the table of kernels is as it was."""
    before = dict(_AttentionBackendRegistry._backends)
    pipes = [guided(stock_pipeline("flux")) for _ in range(2)]
    alone = [run(pipe, "flux", PROMPTS[i], num_inference_steps=8).images for i, pipe in enumerate(pipes)]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run, pipe, "flux", PROMPTS[i], num_inference_steps=8) for i, pipe in enumerate(pipes)]
        together = [future.result().images for future in runs]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert before == _AttentionBackendRegistry._backends
