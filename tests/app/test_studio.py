"""What the page does with its pipeline, without a page."""

import threading
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from goca_guidance import GoCASCFGPipeline, SCFGConfig
from goca_guidance.app.studio import LARGEST, METHODS, StoppedError, Studio, parted
from goca_guidance.models import SCENE
from tests.helpers.families import stock_pipeline


PROMPT = "a cat and a bus on grass"


@pytest.fixture
def studio(embedded):
    with closing(Studio(lambda: embedded)) as opened:
        yield opened


def pixels(image):
    return np.asarray(image).astype(int)


def test_three_pictures_of_one_noise(studio, embedded):
    told = []
    made = list(studio.generate(PROMPT, steps=3, seed=4, on_step=lambda *step: told.append(step)))
    assert [method for method, _, _ in made] == list(METHODS)
    assert told == [(method, step) for method in METHODS for step in (1, 2, 3)]

    def alone(**arguments):
        generator = torch.Generator().manual_seed(4)
        return embedded(PROMPT, num_inference_steps=3, guidance_scale=5.0, generator=generator, **arguments).images[0]

    expected = [alone(use_scfg=False), alone(scfg=SCFGConfig(segmentor="s-cfg")), alone()]
    assert all((pixels(image) == pixels(other)).all() for (_, image, _), other in zip(made, expected, strict=True))
    assert len({pixels(image).tobytes() for _, image, _ in made}) == 3


def test_what_the_slider_shows(studio, embedded):
    *_, (_, _, steps) = studio.generate(PROMPT, "dog", steps=2, rate_min=0.9, rate_max=2)
    output = embedded(
        PROMPT, negative_prompt="dog", num_inference_steps=2, guidance_scale=5.0, output_regions=True,
        scfg=SCFGConfig(rate_min=0.9, rate_max=2), generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert steps.names == output.regions[0].labels[0]
    assert torch.equal(torch.nn.functional.one_hot(steps.regions[1].long(), len(steps.names)).bool(),
                       output.regions[1].masks[0].permute(1, 2, 0))  # fmt: skip
    assert torch.equal(steps.guidance, output.guidance_maps[:, 0, 0])
    assert steps.negative == ("dog",)
    assert steps.acting.shape == (2, 1, *steps.guidance.shape[1:])


def test_nothing_is_guided_at_scale_one(studio):
    made = list(studio.generate(PROMPT, guidance_scale=1.0, steps=1))
    assert [steps for *_, steps in made] == [None, None, None]
    assert len({pixels(image).tobytes() for _, image, _ in made}) == 1


def test_a_loop_that_calls_back_in_the_older_way():
    told = []
    pipe = GoCASCFGPipeline.from_pipe(stock_pipeline("pixart-alpha"))
    ((name, after),) = Studio(lambda: pipe)._told(told.append).items()
    after(0, torch.tensor(999), torch.zeros(1))
    assert (name, told) == ("callback", [1])


def test_a_loop_that_guides_by_another_scale():
    told, pipe = [], GoCASCFGPipeline.from_pipe(stock_pipeline("flux"))
    pipe.default_sample_size = 4
    studio = Studio(lambda: pipe)
    made = studio.generate("a cat on grass", steps=1, on_step=lambda *step: told.append(step))
    assert [steps is None for *_, steps in made] == [True, False, False]
    assert told == [(method, 1) for method in METHODS]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": " "}, "an empty one"),
        ({"prompt": PROMPT, "steps": 0}, "`steps`"),
        ({"prompt": PROMPT, "seed": None}, "`seed`"),
        ({"prompt": PROMPT, "rate_min": 2.0, "rate_max": 1.0}, "rate_min"),
    ],
)
def test_a_mistake_says_what_to_do(studio, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        next(studio.generate(**arguments))
    assert next(studio.generate(PROMPT, steps=1))[0] == "CFG"


def test_all_calls_are_made_in_one_thread(embedded, monkeypatch):
    """Two threads that compute would each have helpers of their own, more than there are cores; so would that which loads."""
    seen, threads = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        studio = Studio(lambda: seen.append(torch.get_num_threads()) or embedded)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert seen == [1]

    def told(*step):
        seen.append(threading.get_ident())

    list(studio.generate(PROMPT, steps=1, on_step=told))
    monkeypatch.setattr(studio, "pipe", SimpleNamespace(segment=lambda *a, **k: told() or embedded.segment(*a, **k)))
    studio.segment(str(SCENE), "sheep, water")
    assert len(seen) == 1 + len(METHODS) + 1
    assert len(set(seen[1:])) == 1
    assert threading.get_ident() not in seen


def test_a_closed_page_ends_what_runs(embedded):
    """And waits for it: else the interpreter would end under it."""
    studio, told = Studio(lambda: embedded), []

    def on_step(method, step):
        told.append(step)
        ending.start()
        ending.join(0.5)
        assert ending.is_alive()

    ending = threading.Thread(target=studio.close)
    with pytest.raises(StoppedError):
        list(studio.generate(PROMPT, steps=5, on_step=on_step))
    ending.join(10)
    assert not ending.is_alive()
    assert told == [1]
    with pytest.raises(RuntimeError, match="shutdown"):
        studio.segment(str(SCENE), "sheep, water")


def test_a_model_that_is_none():
    def load():
        raise ValueError("Expected a pipeline's folder.")

    with pytest.raises(ValueError, match="a pipeline's folder"):
        Studio(load)


def test_calls_wait_for_each_other(studio):
    """No picture is begun while another one is in the making."""
    told = []

    def visit(name):
        for _ in studio.generate(PROMPT, steps=2, visitor=name, on_step=lambda *step: told.append((name, *step))):
            pass

    visitors = [threading.Thread(target=visit, args=(name,)) for name in "ab"]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert sorted(told) == [(name, method, step) for name in "ab" for method in sorted(METHODS) for step in (1, 2)]
    assert all((*first[:2], 2) == second for first, second in zip(told[::2], told[1::2], strict=True))


def test_a_stopped_call_ends_at_its_step_and_the_next_one_works(studio, embedded):
    told = []

    def on_step(method, step):
        told.append(step)
        studio.stop("a")

    with pytest.raises(StoppedError):
        list(studio.generate(PROMPT, steps=5, visitor="a", on_step=on_step))
    assert told == [1]
    assert len(list(studio.generate(PROMPT, steps=1, visitor="a"))) == 3
    assert not any(module._forward_hooks for module in embedded.unet.modules())


def test_segment(studio, embedded):
    found = studio.segment(str(SCENE), "sheep, potted plant", background="water")
    expected = embedded.segment(Image.open(SCENE), ["sheep", "potted plant"], background=["water"])
    assert found.classes == ("sheep", "potted plant", "background")
    assert torch.equal(found.label_maps[0], expected.label_maps[0])
    assert studio.segment(str(SCENE), "sheep", threshold=0.5).background.threshold == 0.5


def test_a_large_picture_is_reduced(studio, tmp_path):
    Image.new("L", (10_000, 5_000)).save(tmp_path / "large.png")
    assert studio.segment(str(tmp_path / "large.png"), "cat, dog").sizes == ((LARGEST // 2, LARGEST),)


def test_a_broken_picture(studio, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="readable image file"):
        studio.segment(str(tmp_path / "broken.png"), "cat")
    with pytest.raises(ValueError, match="at least one class name"):
        studio.segment(str(SCENE), " , ")


def test_names_are_parted():
    assert parted("cat, potted plant;\n dog,,") == ["cat", "potted plant", "dog"]


def test_a_model_that_asks_for_more_than_words():
    from diffusers import StableDiffusionInpaintPipeline

    stock = stock_pipeline("sd")
    painting = StableDiffusionInpaintPipeline(**stock.components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="more than words"):
        Studio(lambda: GoCASCFGPipeline.from_pipe(painting))
