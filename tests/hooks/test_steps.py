"""Steps are the loop's: other forwards inside a call count none, parts are all guided, and what cannot be told is refused."""

import copy
import functools

import diffusers
import pytest
import torch

from goca_guidance import GoCASCFGPipeline, SCFGConfig
from goca_guidance.hooks.guided import GuidedCall
from tests.helpers.attention import same
from tests.helpers.families import FAMILIES, run, stock_pipeline
from tests.helpers.guided import NEUTRAL, STEP_CALLBACK, assert_clean, guided
from tests.helpers.tiny import tiny_components


STEPS = 4
HALF = {"scfg_start": 0.25, "scfg_stop": 0.75}  # steps 1 and 2
PICTURE = [torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(3)).numpy()]
steps_with_callback = pytest.mark.parametrize("name", STEP_CALLBACK)


@functools.cache
def expected(name, **kwargs):
    return run(guided(stock_pipeline(name)), name, num_inference_steps=STEPS, output_regions=True, **kwargs)


def assert_as_alone(name, pipe, **kwargs):
    """Images and regions of a call in which others run forwards, in the whole of it and in some of its steps."""
    for window in ({}, HALF):
        found = run(pipe, name, num_inference_steps=STEPS, output_regions=True, **window, **kwargs)
        alone = expected(name, **window)
        assert torch.equal(found.images, alone.images)
        assert len(found.regions) == len(alone.regions) == (2 if window else STEPS)
        assert all(map(same, found.regions, alone.regions))
        assert_clean(pipe)


def denoiser(pipe, name):
    return getattr(pipe, FAMILIES[name].denoiser)


class Echo:
    """The denoiser's last arguments in a loop, called again with a batch of one, of two, of three, at another timestep."""

    def __init__(self, pipe, name):
        self.denoiser, self.calls = denoiser(pipe, name), 0
        self.handle = self.denoiser.register_forward_pre_hook(self.note, with_kwargs=True)
        self.running, self.given = False, None

    def note(self, module, args, kwargs):
        if not self.running:
            self.given = args, kwargs

    def __call__(self, *args, **kwargs):
        self.running = True
        given, named = self.given
        for rows in (1, 2, 3):
            for shift in (0, 7):
                changed = [self.resized(value, rows, shift, i == 1) for i, value in enumerate(given)]
                keyed = {key: self.resized(value, rows, shift, key == "timestep") for key, value in named.items()}
                with torch.no_grad():
                    self.denoiser(*changed, **keyed)
                self.calls += 1
        self.running = False
        return {}

    def resized(self, value, rows, shift, is_timestep):
        if isinstance(value, dict):
            return {key: self.resized(part, rows, shift, False) for key, part in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        value = value + shift if is_timestep and shift else value
        batch = len(self.given[0][0] if self.given[0] else self.given[1]["hidden_states"])
        return value[:1].repeat(rows, *[1] * (value.ndim - 1)) if value.ndim and len(value) == batch > 0 else value


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_a_callback_that_calls_the_denoiser(name):
    pipe = guided(stock_pipeline(name))
    echo = Echo(pipe, name)
    echo.handle = None
    preview = lambda *step: echo()  # noqa: E731
    for callback in (preview, functools.partial(preview)):
        found = run(pipe, name, num_inference_steps=STEPS, output_regions=True, callback_on_step_end=callback)
        assert torch.equal(found.images, expected(name).images)
        assert all(map(same, found.regions, expected(name).regions))
    assert echo.calls


@steps_with_callback
def test_a_callback_that_segments(name):
    size = {key: FAMILIES[name].call[key] for key in ("height", "width")}

    def preview(pipe, *step):
        pipe.segment(PICTURE, ["cat", "grass"], **size)
        return {}

    assert_as_alone(name, guided(stock_pipeline(name)), callback_on_step_end=preview)


@steps_with_callback
def test_a_callback_that_runs_other_pipelines_on_the_same_modules(name):
    """Stock, guided, and the very one that is running; each leaves the call in progress alone."""
    stock = stock_pipeline(name)
    pipe, other = guided(stock), guided(stock)
    other.scheduler = stock.scheduler = copy.deepcopy(pipe.scheduler)

    def preview(*step):
        run(stock, name, "a dog")
        inner = run(other, name, "a red bus", output_regions=True)
        assert len(inner.regions) == 2
        return {}

    assert_as_alone(name, pipe, callback_on_step_end=preview)


def test_a_callback_that_calls_the_running_pipeline():
    def preview(pipe, step, *others):
        inside = pipe._goca_call
        if step < STEPS - 1:  # and its scheduler, as stock lets it
            saved = copy.deepcopy(pipe.scheduler)
            run(pipe, "sd", "a dog")
            run(pipe, "sd", "a dog", use_scfg=False)
            pipe.scheduler = saved
        assert pipe._goca_call is inside
        return {}

    assert_as_alone("sd", guided(stock_pipeline("sd")), callback_on_step_end=preview)


def test_a_callback_that_encodes_and_decodes():
    def preview(pipe, step, timestep, tensors):
        pipe.encode_prompt("a dog on a bus", "cpu", 1, True)
        pipe.vae.decode(tensors["latents"])
        return tensors

    assert_as_alone("sd", guided(stock_pipeline("sd")), callback_on_step_end=preview)


def test_forwards_of_a_scheduler_and_of_hooks():
    """They run between a prediction and its product too."""
    pipe = guided(stock_pipeline("sd"))
    embeds, running, calls = pipe.encode_prompt("a dog", "cpu", 1, False)[0], [], []
    step, stock = pipe.scheduler.step, stock_pipeline("sd")
    stock.unet = pipe.unet

    def extra(*args):
        if not running:
            running.append(True)
            for rows in (1, 2):
                pipe.unet(torch.zeros(rows, 4, 16, 16), 3, embeds.repeat(rows, 1, 1))
            run(stock, "sd", num_inference_steps=1)
            running.clear()
            calls.append(True)

    def stepped(*args, **kwargs):
        extra()
        return step(*args, **kwargs)

    stepped.__wrapped__ = step
    pipe.scheduler.step = stepped
    handles = [pipe.unet.register_forward_pre_hook(lambda *_: extra()), pipe.unet.register_forward_hook(extra)]
    handles.append(pipe.unet.mid_block.register_forward_hook(extra))
    try:
        for window in ({}, HALF):
            found = run(pipe, "sd", num_inference_steps=STEPS, output_regions=True, **window)
            assert torch.equal(found.images, expected("sd", **window).images)
            assert all(map(same, found.regions, expected("sd", **window).regions))
        assert len(calls) == 2 * 4 * STEPS
    finally:
        for handle in handles:
            handle.remove()
    assert_clean(pipe)


class Previewing(diffusers.StableDiffusionPipeline):
    """One of its own methods is a callback, and another pipeline of its class runs before its loop."""

    def preview(self, pipe, step, timestep, tensors):
        self.unet(tensors["latents"], timestep, self.encode_prompt("a dog", "cpu", 1, False)[0])
        return {}

    def __call__(self, prompt, guidance_scale=5.0, **kwargs):
        parts = {**self.components, "scheduler": copy.deepcopy(self.scheduler)}
        diffusers.StableDiffusionPipeline.__call__(Previewing(**parts), "a dog", num_inference_steps=1)
        return super().__call__(prompt, guidance_scale=guidance_scale, **kwargs, callback_on_step_end=self.preview)


def test_a_subclass_whose_own_methods_preview():
    stock = Previewing(**tiny_components())
    stock.set_progress_bar_config(disable=True)
    found = run(guided(stock), "sd", num_inference_steps=STEPS, output_regions=True)
    assert torch.equal(found.images, expected("sd").images)
    assert len(found.regions) == STEPS
    assert found.regions[0].labels == (("cat", "grass", "<sos>"),)  # the other pipeline's prompt was read too


# ---- loops -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kind",
    [
        diffusers.HeunDiscreteScheduler,  # the same timestep twice
        diffusers.KDPM2DiscreteScheduler,  # another one between
        diffusers.KDPM2AncestralDiscreteScheduler,
        diffusers.DPMSolverSinglestepScheduler,
    ],
)
@pytest.mark.parametrize("name", ["sd", "pixart-alpha"])
def test_every_call_of_a_scheduler_of_higher_order_is_a_step(name, kind):
    stock = stock_pipeline(name, scheduler=kind.from_config(stock_pipeline(name).scheduler.config))
    pipe = guided(stock)
    assert torch.equal(run(pipe, name, scfg=NEUTRAL).images, run(stock, name).images)
    run(stock, name, num_inference_steps=3)
    calls = len(stock.scheduler.timesteps)
    for start, stop in ((0.0, 1.0), (0.0, 0.5), (0.4, 1.0)):
        found = run(pipe, name, num_inference_steps=3, output_regions=True, scfg_start=start, scfg_stop=stop)
        assert len(found.regions) == sum(start <= i / calls < stop for i in range(calls))


class Repeating(diffusers.DDIMScheduler):
    """Goes back to noise, as RePaint does: timesteps come again."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.timesteps = self.timesteps[[0, 1, 1, 0, 1, 2, 2, 3]]


def test_a_timestep_that_is_repeated_at_once_is_two_steps():
    stock = stock_pipeline("sd", scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1))
    found = run(guided(stock), "sd", num_inference_steps=4, output_regions=True, scfg_stop=0.5)
    assert len(stock.scheduler.timesteps) == 5
    assert len(found.regions) == 3


def test_repeated_timesteps_are_steps_of_their_own():
    stock = stock_pipeline("sd", scheduler=Repeating.from_config(stock_pipeline("sd").scheduler.config))
    found = run(guided(stock), "sd", num_inference_steps=4, output_regions=True, scfg_stop=0.5)
    assert len(found.regions) == 4
    every = SCFGConfig(every=2, rate_min=1, rate_max=1)
    found = run(guided(stock), "sd", num_inference_steps=4, output_regions=True, scfg=every)
    assert [same(a, b) for a, b in zip(found.regions[::2], found.regions[1::2], strict=True)] == [True] * 4


class Writing(diffusers.StableDiffusionPipeline):
    """A loop of its own, which tells each timestep in the same memory."""

    @torch.no_grad()
    def __call__(self, prompt=None, guidance_scale=5.0, num_inference_steps=4, return_dict=True, **kwargs):
        embeds = torch.cat(self.encode_prompt(prompt, "cpu", 1, True)[::-1])
        self.scheduler.set_timesteps(num_inference_steps)
        latents, told = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(2)
        for t in self.scheduler.timesteps.tolist():
            told.fill_(t)
            latents = self.step(latents, t, told, embeds, guidance_scale)
        return diffusers.pipelines.stable_diffusion.StableDiffusionPipelineOutput(latents, None)

    def step(self, latents, t, told, embeds, scale):
        negative, positive = self.unet(latents.repeat(2, 1, 1, 1), told, embeds).sample.chunk(2)
        return self.scheduler.step(negative + scale * (positive - negative), t, latents).prev_sample


def built(kind, **components):
    stock = kind(**tiny_components() | components)
    stock.set_progress_bar_config(disable=True)
    return stock


def test_timesteps_told_in_the_same_memory():
    found = guided(built(Writing))("a cat on grass", output_regions=True, scfg_stop=0.5)
    assert len(found.regions) == 2


# ---- parts -----------------------------------------------------------------------------------------------------------
def panorama(**kwargs):
    wide = {"height": 32, "width": 48, "guidance_scale": 5.0, "output_type": "latent", "num_inference_steps": 3}
    return {**wide, "generator": torch.Generator().manual_seed(0), **kwargs}


@pytest.fixture
def views(monkeypatch):
    """A panorama pipeline whose windows are as small as its model."""
    get_views = diffusers.StableDiffusionPanoramaPipeline.get_views

    def small(self, height, width, circular_padding=False):
        return get_views(self, 4 * height, 4 * width, window_size=16, stride=8, circular_padding=circular_padding)

    monkeypatch.setattr(diffusers.StableDiffusionPanoramaPipeline, "get_views", small)
    return built(diffusers.StableDiffusionPanoramaPipeline)


def test_all_views_are_guided(views):
    pipe = guided(views)
    stock = views("a cat on grass", **panorama()).images
    assert torch.equal(pipe("a cat on grass", **panorama(scfg=NEUTRAL)).images, stock)
    found = pipe("a cat on grass", **panorama(output_regions=True))
    count = len(views.get_views(32, 48))
    assert count > 1
    assert len(found.regions) == len(found.guidance_maps) == 3 * count
    assert not torch.equal(found.images, stock)
    some = pipe("a cat on grass", **panorama(output_regions=True, scfg_start=1 / 3, scfg_stop=2 / 3))
    assert len(some.regions) == count


def test_regions_of_one_view_do_not_serve_another(views):
    """`every` counts steps of one prediction."""
    pipe = guided(views)
    once, reused = (pipe("a cat on grass", **panorama(scfg=SCFGConfig(every=n))).images for n in (1, 2))
    assert torch.equal(once, reused)


def test_views_in_one_batch_are_refused(views):
    with pytest.raises(ValueError, match=r"predictions of 1 images in a batch of 2 x 1 .* got a batch of 4"):
        guided(views)("a cat on grass", **panorama(view_batch_size=2))


class Swapping(Writing):
    """Another denoiser from the second step on; it is no component."""

    def step(self, latents, t, told, embeds, scale):
        first, self.unet = self.unet, self.second if t < 700 else self.unet
        try:
            return super().step(latents, t, told, embeds, scale)
        finally:
            self.unet = first


def test_a_swapped_denoiser_is_refused():
    stock = built(Swapping)
    stock.second = tiny_components(seed=1)["unet"]
    pipe = guided(stock)
    pipe.second = stock.second
    with pytest.raises(RuntimeError, match="another model predicts some steps"):
        pipe("a cat on grass")
    assert_clean(pipe)


class Two(diffusers.StableDiffusionPipeline):
    def __init__(self, unet_2, **kwargs):
        super().__init__(**kwargs)
        self.register_modules(unet_2=unet_2)


def test_two_denoisers_are_refused_before_the_loop():
    parts, loops = tiny_components(), []
    requires = parts.pop("requires_safety_checker")
    stock = Two(unet_2=tiny_components(seed=1)["unet"], **parts, requires_safety_checker=requires)

    class Ours(GoCASCFGPipeline, Two):
        def encode_prompt(self, *args, **kwargs):
            loops.append(True)

    pipe = Ours(unet_2=stock.unet_2, **parts, requires_safety_checker=requires)
    with pytest.raises(ValueError, match="unet_2"):
        run(pipe, "sd")
    assert not loops


class Merging(Writing):
    """Two halves of the image are predicted one after another and mixed as one."""

    def step(self, latents, t, told, embeds, scale):
        halves = [self.unet(half.repeat(2, 1, 1, 1), told, embeds).sample for half in latents.chunk(2, 3)]
        negative, positive = torch.cat(halves, 3).chunk(2)
        return self.scheduler.step(negative + scale * (positive - negative), t, latents).prev_sample


class Tiling(Writing):
    """One half is predicted, and repeated."""

    def step(self, latents, t, told, embeds, scale):
        negative, positive = (
            self.unet(latents[..., :8].repeat(2, 1, 1, 1), told, embeds).sample.repeat(1, 1, 1, 2).chunk(2)
        )
        return self.scheduler.step(negative + scale * (positive - negative), t, latents).prev_sample


class Twice(Writing):
    """Every image's difference is multiplied by itself."""

    def step(self, latents, t, told, embeds, scale):
        negative, positive = self.unet(latents.repeat(2, 1, 1, 1), told, embeds).sample.chunk(2)
        mixed = negative + 0.5 * (scale * (positive - negative)) + 0.5 * (scale * (positive - negative))
        return self.scheduler.step(mixed, t, latents).prev_sample


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Merging, "predicts again before it"), (Tiling, "puts parts together"), (Twice, "several times")],
)
def test_a_loop_that_mixes_otherwise_is_refused(kind, message):
    pipe = guided(built(kind))
    with pytest.raises(RuntimeError, match=message):
        pipe("a cat on grass")
    assert_clean(pipe)


def elsewhere(unet, *args):
    return unet(*args).sample


class Helped(Writing):
    def step(self, latents, t, told, embeds, scale):
        negative, positive = elsewhere(self.unet, latents.repeat(2, 1, 1, 1), told, embeds).chunk(2)
        return self.scheduler.step(negative + scale * (positive - negative), t, latents).prev_sample


def test_a_loop_whose_forwards_cannot_be_told_from_others_is_refused():
    with pytest.raises(RuntimeError, match=r"called by elsewhere in tests\.hooks\.test_steps"):
        guided(built(Helped))("a cat on grass")


def test_steps_without_a_product_are_counted(monkeypatch):
    """A loop that stops mixing goes on making steps."""

    def cut(pipe, step, timestep, tensors):
        pipe._guidance_scale = 0.0 if step == 0 else 5.0
        tensors["prompt_embeds"] = embeds[1:] if step == 0 else embeds
        return tensors

    pipe = guided(stock_pipeline("sd"))
    positive, negative = pipe.encode_prompt("a cat on grass", "cpu", 1, True)
    embeds, seen, forward = torch.cat([negative, positive]), [], GuidedCall.on_forward

    def noted(call, *args):
        forward(call, *args)
        seen.append((call.step, call.branches))

    monkeypatch.setattr(GuidedCall, "on_forward", noted)
    run(
        pipe,
        "sd",
        num_inference_steps=3,
        callback_on_step_end=cut,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    assert seen == [(1, (0, 1)), (2, ()), (3, (0, 1))]
