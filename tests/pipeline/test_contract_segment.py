"""Every family's regions, guidance and segmentation, each against something independent."""

import functools
import inspect
import math
from unittest.mock import patch

import diffusers
import pytest
import torch
from PIL import Image

from goca_guidance import GoCAConfig, SCFGConfig
from goca_guidance.denoisers.adapters import denoiser_of, family_of
from goca_guidance.method.goca import normalise
from goca_guidance.method.scfg import rate_map
from goca_guidance.method.segmentor import GoCASegmentor
from goca_guidance.real_images.segment import ClassForwards
from tests.helpers.families import FAMILIES, run, stock_pipeline
from tests.helpers.guided import (
    END_SINK,
    LABELS,
    NEUTRAL,
    PROMPT,
    PROMPTS,
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


CLASSES = ["cat", "grass"]
DEFAULT = SCFGConfig()
NEGATIVE = "dog on grass"


def segmented(pipe, name: str, images, **kwargs):
    """16 x 24 latent pixels."""
    return pipe.segment(images, CLASSES, **wide(name), **kwargs)


def seen_by(denoiser) -> tuple[list[dict], torch.utils.hooks.RemovableHandle]:
    """The arguments of every call of the denoiser, by name, from now on."""
    seen: list[dict] = []

    def look(module, args, kwargs):
        seen.append(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

    return seen, denoiser.register_forward_pre_hook(look, with_kwargs=True)


def sample(arguments: dict) -> torch.Tensor:
    return arguments["sample" if "sample" in arguments else "hidden_states"]


# ---- what reaches the scheduler --------------------------------------------------------------------------------------
def watched(pipe, name: str, **kwargs):
    """The output; of each step, the raw unconditional and conditional predictions, and what the scheduler received."""
    raw, received, step = [], [], pipe.scheduler.step

    @functools.wraps(step)
    def receive(model_output, *args, **kwargs):
        received.append(model_output.double())
        return step(model_output, *args, **kwargs)

    denoiser = denoiser_of(pipe.components)
    hook = denoiser.register_forward_hook(lambda module, args, output: raw.append(output[0].double()))
    with patch.object(pipe.scheduler, "step", receive):
        output = run(pipe, name, output_regions=True, **kwargs)
    hook.remove()
    predictions = zip(raw[1::2], raw[::2], strict=True) if name == "flux" else [both.chunk(2) for both in raw]
    return output, list(predictions), received


def expected(name: str, uncond, cond, regions, scale: float, scfg: SCFGConfig = DEFAULT):
    """Guidance in float64 as the scheduler gets it, and the guidance map."""
    if name == "hunyuan":  # the learned variance is dropped before the mix
        uncond, cond = uncond.chunk(2, 1)[0], cond.chunk(2, 1)[0]
    height, width = regions.masks.shape[-2:]
    delta = cond - uncond
    maps = diffusers.FluxPipeline._unpack_latents(delta, 2 * height, 2 * width, 2) if name == "flux" else delta
    measured = maps[:, :4] if name.startswith("pixart") and not scfg.variance_channels else maps
    rate = rate_map(measured, regions, scale, scfg).double()
    spread = rate.expand_as(maps)
    spread = diffusers.FluxPipeline._pack_latents(spread, *maps.shape) if name == "flux" else spread
    mixed = uncond + scale * spread * delta
    return mixed.chunk(2, 1)[0] if name.startswith("pixart") else mixed, scale * rate


@pytest.mark.parametrize("scfg", [DEFAULT, SCFGConfig(rate_min=0.5, ceiling=6.0, variance_channels=True)])
@every_family
def test_the_rate_reaches_the_scheduler(name, scfg):
    """Two prompts, images that are not square."""
    ours, scale = guided(stock_pipeline(name)), FAMILIES[name].call[FAMILIES[name].scale]
    arguments = batch(name, PROMPTS, [0, 1]) | wide(name)
    output, predictions, received = watched(ours, name, **arguments, scfg=scfg)
    assert len(predictions) == len(received) == len(output.regions) == len(output.guidance_maps) == 2
    for i, ((uncond, cond), got) in enumerate(zip(predictions, received, strict=True)):
        wanted, map_ = expected(name, uncond, cond, output.regions[i], scale, scfg)
        assert got.shape == wanted.shape
        assert distance(got, wanted) < 1e-6
        assert distance(output.guidance_maps[i], map_) < 1e-6
        assert output.guidance_maps[i].std() > 0.01


@every_family
def test_guidance_is_plain_before_the_start_and_after_the_stop(name):
    ours, scale = guided(stock_pipeline(name)), FAMILIES[name].call[FAMILIES[name].scale]
    between = {"num_inference_steps": 4, "scfg_start": 0.3, "scfg_stop": 0.75}
    output, predictions, received = watched(ours, name, **between)
    assert len(received) == 4
    _, _, stock = watched(ours, name, **between | {"use_scfg": False})
    assert all(torch.equal(received[i], stock[i]) for i in range(2))
    for i, regions in enumerate([None, None, *output.regions, None]):
        uncond, cond = predictions[i]
        scfg = NEUTRAL if regions is None else DEFAULT
        wanted, _ = expected(name, uncond, cond, regions or output.regions[0], scale, scfg)
        assert distance(received[i], wanted) < 1e-6
    if name == "sd":  # the loop's own product, bit for bit, after the stop too
        uncond, cond, got = (tensor.float() for tensor in (*predictions[3], received[3]))
        assert torch.equal(got, uncond + scale * (cond - uncond))


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_a_scale_raised_between_steps_is_followed(name):
    stock, ours = pair(name)

    def raise_scale(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1
        return tensors

    raised = {"callback_on_step_end": raise_scale, "num_inference_steps": 3}
    assert torch.equal(latents(stock, name, **raised), latents(ours, name, scfg=NEUTRAL, **raised))
    output, predictions, received = watched(ours, name, **raised)
    for i, ((uncond, cond), got) in enumerate(zip(predictions, received, strict=True)):
        wanted, map_ = expected(name, uncond, cond, output.regions[i], 5.0 + i)
        assert distance(got, wanted) < 1e-6
        assert distance(output.guidance_maps[i], map_) < 1e-6


@every_family
def test_regions_are_a_partition_at_the_latents_size(name):
    ours, size = guided(stock_pipeline(name)), wide(name)
    output = run(ours, name, **batch(name, PROMPTS, [0, 1]), **size, output_regions=True)
    latent = tuple(side // ours.vae_scale_factor for side in size.values())
    assert len(output.regions) == 2
    assert output.guidance_maps.shape == (2, 2, 1, *latent)
    for regions in output.regions:
        assert regions.labels == tuple(labelled(name, words) for words in LABELS)
        assert regions.masks.shape == (2, len(regions.labels[0]), *latent)
        assert regions.foreground.shape == (2, 1, *latent)
        assert (regions.masks.sum(1) == 1).all()


def attention_by_hand(name: str) -> list[torch.Tensor]:
    """Head means over the text of the first step's text layers, [uncond, cond] p n each, in a run of the stock pipeline."""
    stock, calls, steps, attend = stock_pipeline(name), [], [], torch.nn.functional.scaled_dot_product_attention
    denoiser = denoiser_of(stock.components)

    def attention(query, key, value, attn_mask=None, *args, **kwargs):
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        calls.append((query @ key.mT * scale + (0 if attn_mask is None else attn_mask)).softmax(-1).mean(1))
        return attend(query, key, value, attn_mask, *args, **kwargs)

    before = denoiser.register_forward_pre_hook(lambda *_: calls.clear())
    after = denoiser.register_forward_hook(lambda *_: steps.append(list(calls)))
    with patch("torch.nn.functional.scaled_dot_product_attention", attention):
        run(stock, name, **wide(name))
    before.remove(), after.remove()
    if name == "flux":  # the conditional prediction comes first; text comes before pixels
        return [torch.cat(both)[:, -96:, :-96] for both in zip(steps[1], steps[0], strict=True)]
    if name == "sd3":
        return [probs[:, :96, 96:] for probs in steps[0] if probs.shape[-1] > 96]
    return [probs for probs in steps[0] if probs.shape[1] in (96, 384) and probs.shape[1] != probs.shape[2]]


@every_family
def test_regions_and_foreground_from_attention_by_hand(name):
    """Plain means over heads and layers, no refinement: the words' tokens, the sink token and its prediction."""
    plain = GoCAConfig.vanilla(refine_order=0)
    regions = run(guided(stock_pipeline(name)), name, **wide(name), goca=plain, output_regions=True).regions[0]
    grids = {384: (16, 24), 96: (8, 12)}
    layers = [probs.mT.unflatten(-1, grids[probs.shape[1]]) for probs in attention_by_hand(name)]
    size = (16, 24) if name == "sd" else (8, 12)
    maps = [torch.nn.functional.interpolate(layer, size, mode="bilinear") for layer in layers]
    both = torch.stack(maps).mean(0)
    uncond, cond = (both / both.sum(1, keepdim=True))[:, None]  # in joint attention pixels have a share
    second = {"sd3": 24, "hunyuan": 77}.get(name)  # where a second encoder's tokens start, which are T5's
    words = [[1], [3]] if name in END_SINK else [[2], [4], [0]]
    words = [[2, second + 1], [4, second + 3], [0]] if second else words
    scores = normalise(torch.stack([cond[:, word].mean(1) for word in words], 1), plain)
    sink = cond[:, 4:5] if name in END_SINK else (cond if name in ("sdxl", "sd3") else uncond)[:, :1]
    masks = torch.nn.functional.one_hot(scores.argmax(1), len(words)).movedim(-1, 1)
    expected_masks, expected_foreground = (
        torch.nn.functional.interpolate(found.float(), (16, 24)).bool()
        for found in (masks, normalise(sink, plain) < 0.5)
    )
    assert (regions.masks == expected_masks).float().mean() > 0.99
    assert (regions.foreground == expected_foreground).float().mean() > 0.99
    assert 0.05 < regions.foreground.float().mean() < 0.95


@every_family
def test_the_segmentor_of_scfg_itself(name):
    ours = guided(stock_pipeline(name))
    output = run(ours, name, scfg=SCFGConfig(segmentor="s-cfg"), output_regions=True)
    assert torch.isfinite(output.images).all()
    assert (output.regions[0].masks.sum(1) == 1).all()
    assert {"cat", "grass"} <= {label.strip("▁").removesuffix("</w>") for label in output.regions[0].labels[0]}
    assert distance(output.images, latents(ours, name)) > 1e-4


# ---- the negative prompt ---------------------------------------------------------------------------------------------
@every_family
def test_negative_word_maps(name):
    """As the segmentation of the same latents at the same timestep sees the words, if it reads the negative prompt."""
    ours = guided(stock_pipeline(name))
    family = family_of(denoiser_of(ours.components))
    parameters = inspect.signature(FAMILIES[name].stock.__call__).parameters
    length = {key: parameters[key].default for key in ("max_sequence_length",) if key in parameters}  # as segmented
    seen, hook = seen_by(family.denoiser)
    output = run(ours, name, negative_prompt=NEGATIVE, output_negative_maps=True, **length)
    hook.remove()
    assert [maps.labels for maps in output.negative_maps] == [(("dog", "grass"),)] * 2
    noisy = [sample(arguments)[:1] for arguments in (seen[1::2] if name == "flux" else seen)]
    for t, latent, maps in zip(ours.scheduler.timesteps, noisy, output.negative_maps, strict=True):
        if name == "flux":
            latent = diffusers.FluxPipeline._unpack_latents(latent, 32, 32, 2)
        forwards = ClassForwards(ours, family, [["dog", "grass"]], GoCAConfig(), GoCASegmentor)
        scores = forwards.run(FAMILIES[name].stock, [NEGATIVE], [(t.item(), latent)])
        assert scores.std() > 0.05
        assert torch.allclose(maps.scores, scores, atol=1e-3)


@every_family
def test_negative_word_maps_of_a_batch(name):
    """Negative prompts of different lengths, two images of each."""
    ours, negatives = guided(stock_pipeline(name)), ["a dog", "red bus on grass"]
    each = batch(name, PROMPTS, range(4)) | {"negative_prompt": negatives, "num_images_per_prompt": 2}
    both = run(ours, name, **each, output_negative_maps=True).negative_maps[0]
    assert both.labels == (("dog",),) * 2 + (("red", "bus", "grass"),) * 2
    for i in range(4):
        given = {"prompt": PROMPTS[i // 2], "negative_prompt": negatives[i // 2], "seed": i}
        alone = run(ours, name, **given, output_negative_maps=True).negative_maps[0]
        k = len(alone.labels[0])
        if name != "hunyuan":  # whose stock pipeline hands out the text masks of two prompts in turn
            assert torch.allclose(both.scores[i, :k], alone.scores[0], atol=1e-3)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_negative_word_maps_beside_prompt_embeds(name):
    """The only prompt that the encoder reads is then the negative one."""
    stock, ours = pair(name)
    asked = {"negative_prompt": NEGATIVE, "output_negative_maps": True, "goca": GoCAConfig(drop_stop_words=False)}
    given = {key: value for key, value in embedded(stock, name).items() if not key.startswith("negative")}
    read = run(ours, name, PROMPT, **asked)
    named = run(ours, name, None, **given, region_tokens=ours.words(PROMPT), **asked)
    assert named.negative_maps[0].labels == read.negative_maps[0].labels == (("dog", "on", "grass"),)
    assert torch.allclose(named.negative_maps[1].scores, read.negative_maps[1].scores, atol=1e-4)


def test_texts_of_two_lengths():
    """What a forward predicts depends on its own text: Flux's negative one may be longer."""
    stock, ours = pair("flux")
    embeds, pooled, _ = stock.encode_prompt(PROMPT, max_sequence_length=16)
    asked = {"negative_prompt": NEGATIVE, "output_negative_maps": True, "output_regions": True}
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "region_tokens": ours.words(PROMPT)}
    short, long = run(ours, "flux", None, **given, **asked), run(ours, "flux", PROMPT, **asked)
    assert torch.equal(short.negative_maps[0].scores, long.negative_maps[0].scores)
    assert len(short.regions) == len(long.regions) == 2


def test_one_negative_prompt_serves_every_prompt():
    given = batch("sdxl", PROMPTS, [0, 1]) | {"negative_prompt": NEGATIVE, "output_negative_maps": True}
    assert run(guided(stock_pipeline("sdxl")), "sdxl", **given).negative_maps[0].labels == (("dog", "grass"),) * 2


# ---- segmentation ----------------------------------------------------------------------------------------------------
@every_family
def test_scores_and_labels(name, image):
    ours = guided(stock_pipeline(name))
    before, scheduler, configs = latents(ours, name), ours.scheduler, [dict(ours.config), dict(ours.scheduler.config)]
    result = segmented(ours, name, image)
    assert result.scores.shape == (1, 2, *((16, 24) if name == "sd" else (8, 12)))  # where the finest text layers are
    assert result.scores.dtype == torch.float32
    assert (result.scores.amin((-2, -1)) == 0).all()
    assert (result.scores.amax((-2, -1)) == 1).all()
    resized = torch.nn.functional.interpolate(result.scores, (40, 52), mode="bilinear")
    assert torch.equal(result.label_maps[0], resized.argmax(1)[0])
    assert result.classes == tuple(CLASSES)
    assert torch.equal(result.scores, segmented(ours, name, image).scores)
    assert ours.scheduler is scheduler
    assert [dict(ours.config), dict(ours.scheduler.config)] == configs
    assert_clean(ours)
    assert torch.equal(latents(ours, name), before)


@every_family
def test_a_batch_of_pictures_equals_each_alone(name, image):
    ours, other = guided(stock_pipeline(name)), image.transpose(Image.ROTATE_90)
    both = segmented(ours, name, [image, other])
    for i, one in enumerate((image, other)):
        alone = segmented(ours, name, one)
        assert torch.allclose(both.scores[i], alone.scores[0], atol=1e-3)
        assert both.label_maps[i].shape == one.size[::-1]
        assert (both.label_maps[i] == alone.label_maps[0]).float().mean() > 0.99


def shifted(name: str, t: int, tokens: int) -> float:
    """The share of noise at a timestep, with the shifts of the papers of Stable Diffusion 3 and of Flux.1's release."""
    if name == "sd3":
        return 3 * t / (1000 + 2 * t)
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    return math.exp(mu) / (math.exp(mu) + 1000 / t - 1)


@every_family
def test_one_forward_for_each_noise(name, image):
    """Batch one, conditional, on the picture's latents noised to the timestep, as computed by hand."""
    ours = guided(stock_pipeline(name))
    flow = name in ("flux", "sd3")
    if flow:
        ours.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=name == "flux")
    seen, hook = seen_by(denoiser_of(ours.components))
    segmented(ours, name, image)
    segmented(ours, name, image, timestep=[50, 150], num_noises=2)
    hook.remove()
    pixels = ours.image_processor.preprocess(image, **wide(name))
    clean = ours.vae.encode(pixels).latent_dist.mode().detach() - (ours.vae.config.shift_factor or 0)
    clean, preset = clean * ours.vae.config.scaling_factor, family_of(denoiser_of(ours.components)).preset.timestep
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    calls = [(preset, 0), (50, 1), (50, 1), (150, 1), (150, 1)]
    assert len(seen) == len(calls)
    for arguments, (t, run_) in zip(seen, calls, strict=True):
        noise = torch.randn(clean.shape, generator=generators[run_])
        if flow:
            share = shifted(name, t, 8 * 12)
            told, noisy = share * (1 if name == "flux" else 1000), (1 - share) * clean + share * noise
        else:
            kept = ours.scheduler.alphas_cumprod[t]
            told, noisy = t, kept**0.5 * clean + (1 - kept) ** 0.5 * noise
        assert float(arguments["timestep"].flatten()[0]) == pytest.approx(told, rel=1e-4)
        noisy = diffusers.FluxPipeline._pack_latents(noisy, *noisy.shape) if name == "flux" else noisy
        assert sample(arguments).shape == noisy.shape
        assert torch.allclose(sample(arguments), noisy, atol=1e-5)
        text = arguments["encoder_hidden_states"]
        assert len(text) == 1


@every_family
def test_noises_are_averaged(name, image):
    ours, generator = guided(stock_pipeline(name)), torch.Generator().manual_seed(3)
    singles = [segmented(ours, name, image, generator=generator).scores for _ in range(3)]
    averaged = segmented(ours, name, image, num_noises=3, generator=torch.Generator().manual_seed(3)).scores
    assert not torch.allclose(singles[0], singles[1], atol=1e-3)
    assert torch.allclose(averaged, torch.stack(singles).mean(0), atol=1e-5)


@every_family
def test_a_class_that_the_prompt_lacks(name, image):
    ours = guided(stock_pipeline(name))
    with pytest.raises(ValueError, match="Expected the class 'grass' among the words"):
        segmented(ours, name, image, prompt="a cat")
    assert_clean(ours)
    named = segmented(ours, name, image, prompt="a photo of a cat and grass")
    assert not torch.allclose(named.scores, segmented(ours, name, image).scores, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_family
def test_segmentation_in_half_precision(name, dtype, image):
    ours = guided(stock_pipeline(name))
    full, half = segmented(ours, name, image).scores, segmented(ours.to(dtype), name, image).scores
    assert half.dtype == torch.float32
    assert (full - half).abs().mean() < 0.1


@pytest.mark.parametrize(("build", "name"), VARIANTS)
def test_variants_segment_as_the_text_to_image_pipeline(build, name, image):
    stock, _ = build(name)
    theirs = segmented(guided(stock_pipeline(name)), name, image)
    ours = guided(stock)
    assert torch.equal(segmented(ours, name, image).scores, theirs.scores)
    assert_clean(ours)
