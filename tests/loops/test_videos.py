"""Videos of one frame, of odd numbers of frames, of several parts, by two denoisers: right, or one clear refusal."""

from functools import partial
from unittest.mock import patch

import diffusers
import pytest
import torch

from goca_guidance.denoisers.adapters import denoiser_of, family_of
from goca_guidance.pipeline import guided as guided_class
from tests.helpers.guided import NEUTRAL, assert_clean, guided
from tests.helpers.loops import cogvideo, ltx, wan
from tests.helpers.loops.every import LOOPS
from tests.helpers.loops.tiny_loop import TinyLoop, build, run
from tests.helpers.loops.trace import latents


def assert_guided(name: str, loop: TinyLoop, frames: int, **call) -> None:
    """A rate of one is stock, any other is not; each step has regions of so many latent frames; no hook is left."""
    stock = build(name, loop)
    expected, pipe = latents(run(stock, loop, **call)), guided(stock)
    assert torch.equal(latents(run(pipe, loop, scfg=NEUTRAL, **call)), expected)
    output = run(pipe, loop, output_regions=True, **call)
    assert not torch.equal(latents(output), expected)
    assert len(output.regions) == loop.guided
    assert {regions.masks.shape[2] for regions in output.regions} == {frames}
    assert output.guidance_maps.shape[:4] == (loop.guided, 1, 1, frames)
    assert_clean(pipe)


@pytest.mark.parametrize(("frames", "latent"), [(1, 1), (5, 2)])
def test_one_frame_and_two(frames, latent):
    assert_guided("WanPipeline", LOOPS["WanPipeline"], latent, num_frames=frames)


def test_two_transformers_share_the_steps():
    """Wan 2.2: the second one serves the last two of three, with a scale of its own."""
    assert_guided("WanPipeline", wan.SECOND["WanPipeline"], 3)


def test_an_odd_number_of_frames_where_a_token_has_two():
    """CogVideoX 1.5 makes a fourth one, and sets its scale anew at each step."""
    assert_guided("CogVideoXPipeline", cogvideo.SECOND["CogVideoXPipeline"], 4)


def test_a_condition_at_a_later_frame_is_a_frame_more():
    """It stands before the video's own in the sequence."""
    assert_guided("LTXConditionPipeline", LOOPS["LTXConditionPipeline"], 4, frame_index=8)


# ---- parts -----------------------------------------------------------------------------------------------------------
LONG = {"num_frames": 33, "temporal_tile_size": 24, "temporal_overlap": 8}


def test_parts_of_several_sizes():
    """They are guided; only their maps cannot be one tensor."""
    name = "LTXI2VLongMultiPromptPipeline"
    loop = ltx.LOOPS[name]
    stock = build(name, loop)
    expected, pipe = latents(run(stock, loop, **LONG)), guided(stock)
    assert torch.equal(latents(run(pipe, loop, scfg=NEUTRAL, **LONG)), expected)
    assert not torch.equal(latents(run(pipe, loop, **LONG)), expected)
    with pytest.raises(RuntimeError, match="latents of one size"):
        run(pipe, loop, output_regions=True, **LONG)
    assert_clean(pipe)


@pytest.mark.parametrize(
    "prompt", [{"prompt": "a cat|a bus"}, {"prompt_segments": [{"start_window": 0, "text": "a bus"}]}]
)
def test_prompts_for_parts_are_refused(prompt):
    name = "LTXI2VLongMultiPromptPipeline"
    with pytest.raises(ValueError, match="one prompt for all frames"):
        run(guided(build(name, LOOPS[name])), LOOPS[name], **prompt)


def test_prompts_for_frames_are_refused():
    loop = LOOPS["AnimateDiffPipeline"]
    with pytest.raises(TypeError, match="a text or a non-empty list of texts"):
        guided(build("AnimateDiffPipeline", loop))(prompt={0: "a cat", 2: "a dog"}, **loop.call)


# ---- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["AnyFlowFAR", "HeliosPyramid", "EasyAnimateControl", "SanaWM", "Kandinsky6TI2VA"])
def test_loops_that_regions_cannot_guide(name):
    with pytest.raises(ValueError, match="use it as it is"):
        guided_class(getattr(diffusers, f"{name}Pipeline"))


def test_attention_of_blocks_is_refused():
    family = family_of(denoiser_of(LOOPS["Kandinsky5T2VPipeline"].components()))
    with pytest.raises(ValueError, match="attention of all tokens"):
        family.size({"hidden_states": torch.zeros(1, 3, 8, 4, 9), "sparse_params": {"to_fractal": True}})


def test_frames_that_are_not_alike_are_refused():
    """A picture of another size stands among the tokens."""
    family = family_of(denoiser_of(LOOPS["LTX2Pipeline"].components()))
    grid = torch.meshgrid(*(torch.arange(n) for n in (3, 4, 2)), indexing="ij")
    places = torch.stack([axis.flatten() for axis in grid]).float()
    size = partial(family.size, {"hidden_states": torch.zeros(1, 24, 4), "video_coords": places[None]})
    assert size() == (3, 4, 2)
    places[1, -8:] *= 2
    with pytest.raises(ValueError, match="whole frames"):
        family.size({"hidden_states": torch.zeros(1, 24, 4), "video_coords": places[None].clone()})


def test_large_layers_are_reduced_at_once_and_alike():
    """As at full size, where no layer waits for others: the first one too has the text's total beside its words."""
    name = "CogVideoXPipeline"
    pipe, loop = guided(build(name, LOOPS[name])), LOOPS[name]
    expected = run(pipe, loop, output_regions=True)
    with patch.dict("goca_guidance.method.aggregation.BATCH", cpu=1):
        found = run(pipe, loop, output_regions=True)
    assert torch.equal(found["regions"][-1].masks, expected["regions"][-1].masks)
