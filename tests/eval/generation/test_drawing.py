"""Pictures of the same noise or the same noised scenes, against the stock pipelines; the rules that guide them, by hand."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps

from eval.common.processes import seed_of
from eval.generation import drawing
from eval.generation.drawing import METHODS, SEED, Drawing, Method, Rule, layout_of, scenes_of_several
from eval.scenes.scene import CLASSES
from goca_guidance import TINY_SD, Regions, SCFGConfig
from goca_guidance.method.scfg import rate_map, weighted_mean


@pytest.fixture(scope="module")
def drawn():
    return Drawing(TINY_SD, scenes_of_several("test", 2, 64), steps=4, batch=1, device="cpu")


def stock(kind, drawn, **kwargs):
    pipe = kind(**drawn.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed_of(SEED, name)) for name in drawn.scenes]
    arguments = {
        "num_inference_steps": drawn.steps,
        "guidance_scale": 3.0,
        "output_type": "pt",
        "generator": generator,
    }
    return pipe(drawn.captions, **arguments, **kwargs).images


def test_plain_guidance_is_the_stock_pipelines(drawn):
    pictures, rates = drawn(METHODS["cfg"], 3.0)
    assert rates == {}
    torch.testing.assert_close(pictures, stock(StableDiffusionPipeline, drawn, height=64, width=64), atol=1e-4, rtol=0)


def test_begun_from_scenes_it_is_the_stock_image_to_image_pipelines(drawn):
    pictures, _ = drawn(METHODS["cfg"], 3.0, "scene")
    expected = stock(StableDiffusionImg2ImgPipeline, drawn, image=drawn.encoded, strength=drawing.STRENGTH)
    torch.testing.assert_close(pictures, expected, atol=1e-4, rtol=0)
    assert (pictures - drawn.reproduced).abs().mean() < (drawn(METHODS["cfg"], 3.0)[0] - drawn.reproduced).abs().mean()


def test_a_late_schedule_of_flow_matching_is_the_end_of_the_whole():
    """The arguments are still seen, and its steps are those of the whole one."""
    whole = FlowMatchEulerDiscreteScheduler()
    late = drawing.beginning_late(whole, 0.75)
    sigmas = np.linspace(1, 0.125, 8)
    for scheduler in (whole, late):
        timesteps, steps = retrieve_timesteps(scheduler, 8, "cpu", sigmas=sigmas)
        assert steps == len(timesteps)
    assert torch.equal(late.timesteps, whole.timesteps[2:])
    assert torch.equal(late.sigmas, whole.sigmas[2:])
    sample, prediction = torch.ones(1, 2), torch.tensor([[1.0, -2.0]])
    for t in late.timesteps:
        sample = late.step(prediction, t, sample).prev_sample
    torch.testing.assert_close(sample, 1 - 0.75 * prediction)


def test_methods_differ_and_tell_their_rates(drawn):
    found = {}
    for name in ("cfg", "goca, equal mean", "layout, objects x 2"):
        found[name], rates = drawn(METHODS[name], 3.0, "scene")
        if name != "cfg":
            assert {key: len(value) for key, value in rates.items()} == dict.fromkeys(
                ("mean_rate", "rate_on_objects", "rate_on_ground", "foreground_iou"), 2
            )
            assert rates["mean_rate"].tolist() == pytest.approx([1, 1], abs=1e-5)
            assert (rates["foreground_iou"] == 1).all() == ("layout" in name)
    pictures = [*found.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])


def test_only_scenes_of_two_or_three_objects():
    assert {len(scene.objects) for scene in scenes_of_several("test", 12, 16).values()} == {2, 3}


def test_layout_of_a_mask():
    """Of four pixels of a latent pixel most are one class; objects are foreground."""
    cat, grass, snow = (CLASSES.index(name) for name in ("cat", "grass", "snow"))
    masks = torch.tensor([[[cat, cat, grass, grass], [cat, grass, grass, snow]]])
    layout = layout_of(masks, (1, 2))
    assert layout.masks.shape == (1, 24, 1, 2)
    assert layout.masks[0, cat, 0].tolist() == [True, False]
    assert layout.masks[0, grass, 0].tolist() == [False, True]
    assert layout.foreground[0, 0, 0].tolist() == [True, False]


def test_rules_by_hand():
    """|delta| is 4 on the object and 1 on the ground, which are found the wrong way round."""
    delta = torch.tensor([[[[4.0, 1.0, 1.0, 1.0]]]])
    masks = torch.tensor([[[[True, False, False, False]], [[False, True, True, True]]]])
    truth = Regions(masks, masks[:, :1], (("cat", "grass"),))
    found = Regions(masks, masks[:, 1:], (("cat", "grass"),))
    config = SCFGConfig(smooth_size=1)
    rule = Rule(Method(config), truth)
    assert torch.equal(rule(delta, found, 3.0, config), rate_map(delta, found, 3.0, config))
    assert {name: value.item() for name, value in rule.means(2).items()} == pytest.approx(
        {
            "mean_rate": 1 + ((0.8 * 4 + 3) / 7 - 1) / 2,
            "rate_on_objects": 0.8,
            "rate_on_ground": 1,
            "foreground_iou": 0,
        }
    )
    assert torch.equal(
        Rule(Method(config, layout=True), truth)(delta, found, 3.0, config), rate_map(delta, truth, 3.0, config)
    )
    twice = Rule(Method(config, layout=True, objects=2.0), truth)(delta, found, 3.0, config)
    assert (twice / twice[..., -1:]).flatten().tolist() == pytest.approx([2, 1, 1, 1])
    assert weighted_mean(twice, delta).item() == pytest.approx(1)
    assert Rule(Method(None)).means(2) == {}
