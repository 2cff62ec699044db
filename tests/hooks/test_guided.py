"""The guided call: its rule, its segmentors, its thread; and `SCFGConfig.every`, by which regions are reused between steps."""

import inspect
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from eval.cost.captured_step import sharpen
from goca_guidance import GoCAConfig, GoCAGuidance, GoCASCFGPipeline, SCFGConfig
from goca_guidance.hooks.guided import SEGMENTORS, GuidedCall
from goca_guidance.method.segmentor import GuidingSegmentor
from tests.helpers.attention import PROMPTS, same
from tests.helpers.families import FAMILIES, run, stock_pipeline
from tests.helpers.guided import every_family, guided
from tests.helpers.modular import modular_pipeline, needs_modular_sd3


STEPS = 5
PLAIN = {"rate_min": 1.0, "rate_max": 1.0}  # regions are found and steer nothing: latents do not depend on the options


def sharp(name: str) -> GoCASCFGPipeline:
    """Our pipeline of a family, whose attention is uneven enough for its regions to change from step to step."""
    stock = stock_pipeline(name)
    sharpen(getattr(stock, FAMILIES[name].denoiser), 6.0)
    return guided(stock)


def generated(pipe, name, **kwargs):
    return run(pipe, name, **{"num_inference_steps": STEPS, "output_regions": True, **kwargs})


@pytest.fixture
def observed(monkeypatch) -> list[tuple[int, tuple[int, ...]]]:
    """Step and predictions of every record that a guided call was handed."""
    seen, on_attention = [], GuidedCall.on_attention

    def counted(call, record):
        seen.append((call.step - 1, call.branches))
        on_attention(call, record)

    monkeypatch.setattr(GuidedCall, "on_attention", counted)
    return seen


@every_family
def test_every_step_is_the_default(name):
    pipe = sharp(name)
    default, one = generated(pipe, name), generated(pipe, name, scfg=SCFGConfig(every=1))
    assert torch.equal(default.images, one.images)
    assert all(same(a, b) for a, b in zip(default.regions, one.regions, strict=True))
    assert not torch.equal(default.images, generated(pipe, name, scfg=SCFGConfig(every=3)).images)


@pytest.mark.parametrize(("every", "window"), [(2, (0.0, 1.0)), (3, (0.0, 1.0)), (9, (0.0, 1.0)), (2, (0.2, 0.8))])
@every_family
def test_regions_are_those_last_found(name, every, window, observed):
    """On the same latents: those of the default at the steps that find regions, which serve the steps between too."""
    pipe, asked = sharp(name), dict(zip(("scfg_start", "scfg_stop"), window, strict=True))
    default = generated(pipe, name, scfg=SCFGConfig(**PLAIN), **asked)
    observed.clear()
    reused = generated(pipe, name, scfg=SCFGConfig(every=every, **PLAIN), **asked)
    assert torch.equal(default.images, reused.images)
    sources = [i - i % every for i in range(len(default.regions))]
    assert all(same(reused.regions[i], default.regions[source]) for i, source in enumerate(sources))
    assert any(not same(reused.regions[i], default.regions[i]) for i in range(len(sources)))  # else nothing is tested
    first = math.ceil(window[0] * STEPS)
    assert {step for step, _ in observed} == {first + source for source in sources}
    assert len(reused.guidance_maps) == len(reused.regions) == len(default.regions)


def test_guidance_between_follows_the_steps_own_delta():
    """The rate of reused regions is taken anew from each step's difference of predictions."""
    found = generated(sharp("sd"), "sd", scfg=SCFGConfig(every=STEPS))
    assert all(same(found.regions[0], regions) for regions in found.regions)
    assert not any(torch.equal(a, b) for a, b in zip(found.guidance_maps, found.guidance_maps[1:], strict=False))


def test_two_calls_a_step_pause_together(observed):
    """Flux predicts twice: at a step that reuses regions neither of its calls is observed."""
    generated(sharp("flux"), "flux", scfg=SCFGConfig(every=2))
    assert {step for step, _ in observed} == {0, 2, 4}
    assert {branches for _, branches in observed} == {(1,)}  # whose sink is in the conditional prediction


@every_family
def test_nothing_carries_over_to_the_next_call(name, observed):
    pipe, scfg = sharp(name), SCFGConfig(every=3)
    once = generated(pipe, name, scfg=scfg)
    other = generated(pipe, name, prompt="a bus", num_inference_steps=2, scfg=scfg)  # ends between two findings
    observed.clear()
    again = generated(pipe, name, scfg=scfg)
    assert other.regions[0].labels != once.regions[0].labels
    assert {step for step, _ in observed} == {0, 3}
    assert torch.equal(once.images, again.images)
    assert all(same(a, b) for a, b in zip(once.regions, again.regions, strict=True))


def test_the_other_segmentor_reuses_regions_too(observed):
    generated(sharp("sd"), "sd", scfg=SCFGConfig(every=2, segmentor="s-cfg"))
    assert {step for step, _ in observed} == {0, 2, 4}


@every_family
def test_negative_maps_are_those_last_found(name):
    """One for each guided step, beside the regions of the step."""
    pipe = sharp(name)
    asked = {"negative_prompt": "a dog on grass", "output_negative_maps": True}
    default = generated(pipe, name, scfg=SCFGConfig(**PLAIN), **asked)
    reused = generated(pipe, name, scfg=SCFGConfig(every=2, **PLAIN), **asked)
    assert len(reused.negative_maps) == len(reused.regions) == STEPS
    for i, maps in enumerate(reused.negative_maps):
        assert torch.equal(maps.scores, default.negative_maps[i - i % 2].scores)
        assert maps.labels == default.negative_maps[i].labels


@pytest.mark.parametrize("name", ["sdxl", pytest.param("sd3", marks=needs_modular_sd3)])
def test_a_guider_reuses_regions_within_its_window(name, observed):
    pipe = modular_pipeline(name)
    sharpen(getattr(pipe, FAMILIES[name].denoiser), 6.0)
    length = {"max_sequence_length": FAMILIES[name].call["max_sequence_length"]} if name == "sd3" else {}

    def found(every):
        observed.clear()
        guider = GoCAGuidance(5.0, start=0.2, stop=0.8, scfg=SCFGConfig(every=every, **PLAIN))
        pipe.update_components(guider=guider)
        call = {"prompt": PROMPTS[0], "negative_prompt": "", "height": 32, "width": 32, "output": "latents"}
        with guider.watching(pipe, keep_regions=True) as seen:
            pipe(**call, **length, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
        return seen.results()[0], {step for step, _ in observed}

    (default, all_steps), (reused, some) = found(1), found(2)
    assert (len(default), all_steps, some) == (3, {1, 2, 3}, {1, 3})
    assert all(same(reused[i], default[source]) for i, source in enumerate((0, 0, 2)))


@every_family
def test_a_batch_equals_its_images_alone(name):
    pipe, options = sharp(name), {"goca": GoCAConfig(working_size=6, agreement_rows=9), "scfg": SCFGConfig(every=2)}
    negative = {"negative_prompt": [""] * 2} if name == "flux" else {}
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    both = generated(pipe, name, prompt=PROMPTS, generator=seeds, **negative, **options)
    for i, prompt in enumerate(PROMPTS):
        alone = generated(pipe, name, prompt=prompt, seed=i, **options)
        assert (both.images[i] - alone.images[0]).norm() < 1e-3 * alone.images.norm()
        masks = both.regions[0].masks[i : i + 1]
        assert torch.equal(masks[:, : len(alone.regions[0].labels[0])], alone.regions[0].masks)


# ---- seams -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SEGMENTORS)
def test_every_segmentor_can_be_chosen_and_is_made_alike(name):
    assert SCFGConfig(segmentor=name)
    parameters = list(inspect.signature(SEGMENTORS[name][0]).parameters)
    assert parameters == list(inspect.signature(GuidingSegmentor.__init__).parameters)[1:]


def test_no_other_segmentor_can_be_chosen():
    with pytest.raises(ValueError, match=", ".join(map(repr, SEGMENTORS))):
        SCFGConfig(segmentor="another")


def test_a_rule_of_ones_own():
    """It is given the difference, the regions and the scale of each step, and its rate guides."""
    seen, twice = [], lambda delta, *others: torch.full_like(delta[:, :1], 2.0)
    pipe = guided(stock_pipeline("sd"))

    def rule(delta, regions, scale, config):
        seen.append((delta.shape, regions.masks.shape[-2:], scale, config))
        return twice(delta)

    pipe.guidance_rule = rule
    output = run(pipe, "sd", scfg=SCFGConfig(), output_regions=True)
    assert seen == [((1, 4, 16, 16), (16, 16), 5.0, SCFGConfig())] * 2
    assert (output.guidance_maps == 10.0).all()
    stock = run(stock_pipeline("sd"), "sd", guidance_scale=10.0)
    assert torch.allclose(output.images, stock.images, atol=1e-4)


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_denoiser_in_another_thread_is_told(name):
    """Its hooks heed their own thread: nothing would be guided, and nobody would know."""
    pipe = guided(stock_pipeline(name))
    denoiser = getattr(pipe, FAMILIES[name].denoiser)
    stock = type(denoiser)

    class Elsewhere(stock):
        def __call__(self, *args, **kwargs):
            return threads.submit(torch.no_grad()(stock.__call__), self, *args, **kwargs).result()

    denoiser.__class__ = Elsewhere
    with ThreadPoolExecutor(1) as threads, pytest.raises(RuntimeError, match="in the thread that watches it"):
        run(pipe, name)
