"""The contract of every family: what diffusers asks of a pipeline, and what ours adds, each against something independent."""

import inspect
import re
import shutil

import diffusers
import pytest
import torch

from goca_guidance import GoCAConfig, GoCASCFGPipeline
from goca_guidance.denoisers.adapters import denoiser_of
from tests.helpers.families import (
    FAMILIES,
    run,
    stock_pipeline,
)
from tests.helpers.guided import (
    LABELS,
    NEUTRAL,
    PROMPT,
    PROMPTS,
    STEP_CALLBACK,
    VARIANTS,
    assert_clean,
    batch,
    distance,
    embedded,
    every_family,
    guided,
    labelled,
    latents,
    pair,
    wide,
)


OURS = {
    "use_scfg",
    "goca",
    "scfg",
    "scfg_start",
    "scfg_stop",
    "region_tokens",
    "output_regions",
    "output_negative_maps",
}


# ---- what diffusers asks ---------------------------------------------------------------------------------------------
@every_family
def test_signature_is_the_stock_one_and_ours(name):
    pipe = guided(stock_pipeline(name))
    stock, ours = (inspect.signature(call).parameters for call in (FAMILIES[name].stock.__call__, type(pipe).__call__))
    assert [ours[parameter] for parameter in ours if parameter in stock] == list(stock.values())
    added = {parameter: ours[parameter] for parameter in ours if parameter not in stock}
    assert set(added) == OURS
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in added.values())
    told = set(re.findall(r"^    (\w+) \(", type(pipe).__call__.__doc__, re.MULTILINE))
    assert set(added) | {"prompt", "num_inference_steps", "generator"} <= told
    assert isinstance(pipe, FAMILIES[name].stock)
    assert isinstance(pipe, GoCASCFGPipeline)


@every_family
def test_from_components_and_back(name):
    """PixArt-alpha and -Sigma have the same components: these are taken for the latter's."""
    stock, ours = pair(name)
    built = GoCASCFGPipeline(**stock.components)
    assert isinstance(built, FAMILIES[name.replace("alpha", "sigma")].stock)
    assert torch.equal(latents(built, name), latents(ours, name))
    assert type(GoCASCFGPipeline.from_pipe(ours)) is type(ours)
    assert torch.equal(latents(type(stock).from_pipe(ours), name), latents(stock, name))


@every_family
def test_save_and_load(name, tmp_path):
    stock, ours = pair(name)
    ours.save_pretrained(tmp_path)
    loaded, own = (cls.from_pretrained(tmp_path) for cls in (GoCASCFGPipeline, type(ours)))
    theirs, automatic = (cls.from_pretrained(tmp_path) for cls in (type(stock), diffusers.DiffusionPipeline))
    assert type(loaded) is type(own) is type(ours)
    assert type(theirs) is type(automatic) is FAMILIES[name].stock
    assert all(distance(latents(pipe, name), latents(ours, name)) < 1e-5 for pipe in (loaded, own))
    assert distance(latents(theirs, name), latents(stock, name)) < 1e-5
    stock.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    first, *others = (tmp_path / "shards" / FAMILIES[name].denoiser).glob("*-of-*.safetensors")
    assert others
    assert distance(latents(GoCASCFGPipeline.from_pretrained(tmp_path / "shards"), name), latents(ours, name)) < 1e-5
    first.unlink()
    with pytest.raises(ValueError, match=f"lacks {FAMILIES[name].denoiser}/{first.name}"):
        GoCASCFGPipeline.from_pretrained(tmp_path / "shards")


@every_family
def test_half_precision_is_saved_and_loaded(name, tmp_path):
    guided(stock_pipeline(name)).to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    loaded = GoCASCFGPipeline.from_pretrained(tmp_path, dtype=torch.float16, variant="fp16")
    assert denoiser_of(loaded.components).dtype == loaded.vae.dtype == loaded.text_encoder.dtype == torch.float16


@every_family
def test_an_incomplete_folder_is_named_before_anything_is_loaded(name, tmp_path):
    stock, part = stock_pipeline(name), FAMILIES[name].denoiser
    stock.save_pretrained(tmp_path)
    weights = next((tmp_path / part).glob("*.safetensors")).rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"lacks {part}/\*\.safetensors"):
        GoCASCFGPipeline.from_pretrained(tmp_path)
    loaded = GoCASCFGPipeline.from_pretrained(tmp_path, **{part: stock.components[part]})  # which needs no weights
    assert denoiser_of(loaded.components) is denoiser_of(stock.components)
    weights.rename(tmp_path / part / weights.name)
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="lacks tokenizer/"):
        GoCASCFGPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").unlink()
    with pytest.raises(ValueError, match="has none"):
        GoCASCFGPipeline.from_pretrained(tmp_path)


@every_family
def test_dict_and_tuple(name):
    stock, ours = pair(name)
    asked = {"output_regions": True, "output_negative_maps": True, "negative_prompt": "a dog", "output_type": "np"}
    full, listed = run(ours, name, **asked), run(ours, name, **asked, return_dict=False)
    theirs = run(stock, name, negative_prompt="a dog", output_type="np", return_dict=False)
    images, *safety, regions, guidance_maps, negative_maps = listed
    assert type(listed) is tuple
    assert (images.shape, images.dtype, safety) == (theirs[0].shape, theirs[0].dtype, list(theirs[1:]))
    assert (full.images == images).all()
    assert torch.equal(full.guidance_maps, guidance_maps)
    assert all(torch.equal(a.masks, b.masks) for a, b in zip(full.regions, regions, strict=True))
    assert all(torch.equal(a.scores, b.scores) for a, b in zip(full.negative_maps, negative_maps, strict=True))
    assert len(run(ours, name, return_dict=False)) == len(theirs)
    assert set(run(ours, name).keys()) == set(run(stock, name).keys())


@every_family
def test_a_batch_equals_its_images_alone(name):
    """Prompts of different lengths, each with its own regions."""
    ours = guided(stock_pipeline(name))
    both = run(ours, name, **batch(name, PROMPTS, [0, 1]), output_regions=True)
    assert both.regions[0].labels == tuple(labelled(name, words) for words in LABELS)
    for i, prompt in enumerate(PROMPTS):
        alone = run(ours, name, prompt, seed=i, output_regions=True)
        assert distance(both.images[i], alone.images[0]) < 1e-3
        assert alone.regions[0].labels == (labelled(name, LABELS[i]),)
        k = len(alone.regions[0].labels[0])
        assert (both.regions[0].masks[i, :k] == alone.regions[0].masks[0]).float().mean() > 0.99
        assert not both.regions[0].masks[i, k:].any()


@every_family
def test_two_images_of_each_prompt(name):
    ours = guided(stock_pipeline(name))
    prompts = PROMPTS[:1] if name == "hunyuan" else PROMPTS  # two: stock itself hands out their text masks in turn
    seeds, repeated = range(2 * len(prompts)), [prompt for prompt in prompts for _ in range(2)]
    twice = run(ours, name, **batch(name, prompts, seeds), num_images_per_prompt=2, output_regions=True)
    spelled = run(ours, name, **batch(name, repeated, seeds), output_regions=True)
    assert len(twice.images) == len(seeds)
    assert twice.regions[0].labels == spelled.regions[0].labels
    assert distance(twice.images, spelled.images) < 1e-3


@pytest.mark.parametrize("name", STEP_CALLBACK)
def test_callbacks_see_every_step_and_change_latents(name):
    stock, ours = pair(name)

    def follow(pipe, **kwargs):
        seen = []

        def callback(pipe, step, timestep, tensors):
            seen.append((step, tensors["latents"]))
            return {"latents": tensors["latents"] + 0.1}

        return latents(pipe, name, num_inference_steps=3, callback_on_step_end=callback, **kwargs), seen

    theirs, neutral, regional = follow(stock), follow(ours, scfg=NEUTRAL), follow(ours)
    assert torch.equal(theirs[0], neutral[0])
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(theirs[1], neutral[1], strict=True))
    assert [step for step, _ in regional[1]] == [0, 1, 2]
    assert torch.equal(regional[0], regional[1][-1][1] + 0.1)
    assert distance(regional[0], theirs[0]) > 1e-4


@pytest.mark.parametrize("name", ["pixart-alpha", "pixart-sigma"])
def test_the_old_callback_sees_every_step(name):
    seen = []
    result = latents(guided(stock_pipeline(name)), name, callback=lambda *step: seen.append(step))
    assert [step for step, _, _ in seen] == [0, 1]
    assert torch.equal(seen[-1][2], result)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@every_family
def test_other_precision(name, dtype):
    stock = stock_pipeline(name)
    ours = guided(stock).to(dtype)
    assert denoiser_of(ours.components).dtype == ours.dtype == dtype
    theirs, neutral, regional = latents(stock, name), latents(ours, name, scfg=NEUTRAL), latents(ours, name)
    assert theirs.dtype == neutral.dtype == regional.dtype == dtype
    assert torch.isfinite(theirs).all()
    assert torch.equal(theirs, neutral)
    assert torch.isfinite(regional).all()
    assert not torch.equal(theirs, regional)


@every_family
def test_prompt_embeds_with_named_regions(name):
    """Without any text encoder, as the call that reads the prompt."""
    stock, ours = pair(name)
    given = {"prompt": None, "negative_prompt": None, **embedded(stock, name)}
    bare = guided(stock, **{part: None for part in stock.components if part.startswith("text_encoder")})
    with pytest.raises(ValueError, match="Expected `region_tokens`"):
        run(bare, name, **given)
    with pytest.raises(ValueError, match="Expected `region_tokens`"):
        run(ours, name, **given)
    read = run(ours, name, PROMPT, goca=GoCAConfig(drop_stop_words=False), output_regions=True)
    named = run(bare, name, **given, region_tokens=bare.words(PROMPT), output_regions=True)
    assert named.regions[0].labels == read.regions[0].labels == (labelled(name, ("a", "cat", "on", "grass")),)
    assert torch.equal(named.regions[0].masks, read.regions[0].masks)
    assert distance(named.images, read.images) < 1e-5


# ---- stock or not ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", ["one", "two", "wide"])
@every_family
def test_off_and_rate_one_equal_stock_bit_for_bit(name, shape):
    stock, ours = pair(name)

    def shaped(pipe, **kwargs):
        shapes = {"one": {}, "two": batch(name, PROMPTS, [0, 1]), "wide": wide(name)}
        return latents(pipe, name, **shapes[shape], **kwargs)

    theirs, one = shaped(stock), {FAMILIES[name].scale: 1.0}
    assert torch.equal(theirs, shaped(ours, use_scfg=False))
    assert torch.equal(theirs, shaped(ours, scfg_stop=0.0))
    assert torch.equal(theirs, shaped(ours, scfg=NEUTRAL))
    assert torch.equal(shaped(stock, **one), shaped(ours, **one))


@every_family
def test_on_differs_and_repeats_itself(name):
    stock, ours = pair(name)
    regional = latents(ours, name)
    assert distance(regional, latents(stock, name)) > 1e-4
    assert torch.equal(regional, latents(ours, name))
    assert_clean(ours)


@pytest.mark.parametrize(("build", "name"), VARIANTS)
def test_variants(build, name):
    stock, arguments = build(name)
    ours = guided(stock)
    assert isinstance(ours, type(stock))
    theirs, neutral = latents(stock, name, **arguments), latents(ours, name, scfg=NEUTRAL, **arguments)
    assert torch.equal(theirs, latents(ours, name, use_scfg=False, **arguments))
    assert torch.equal(theirs, neutral)
    regional = run(ours, name, output_regions=True, **arguments)
    assert distance(regional.images, theirs) > 1e-4
    assert regional.regions[0].labels == (labelled(name, ("cat", "grass")),)
    assert len(regional.regions) == 2
    assert len(run(ours, name, output_regions=True, scfg_stop=0.5, **arguments).regions) == 1
    assert_clean(ours)


@pytest.mark.parametrize("name", ["sd", "flux", "sd3"])
def test_gradients_are_those_of_stock(name):
    """Asked for as of a stock pipeline (diffusers#529); a guided call has none, and says so."""

    def gradient(pipe, **kwargs):
        start = torch.zeros_like(latents(stock, name)).normal_(generator=torch.Generator().manual_seed(1))
        start.requires_grad_()
        given = {"prompt": PROMPT, "num_inference_steps": 2, "output_type": "latent", "latents": start}
        images = type(pipe).__call__.__wrapped__(pipe, **given, **FAMILIES[name].call, **kwargs).images
        return torch.autograd.grad(images.square().sum(), start)[0]

    stock, ours = pair(name)
    expected = gradient(stock)
    assert expected.any()
    assert torch.equal(gradient(ours, use_scfg=False), expected)
    with pytest.raises(ValueError, match="regions have none"):
        gradient(ours)
    assert not latents(ours, name).requires_grad
