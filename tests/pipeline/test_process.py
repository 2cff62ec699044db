"""What else runs in the process: other threads on the same modules, another default dtype or device."""

import copy
import threading
from copy import deepcopy

import numpy as np
import pytest
import torch

from goca_guidance import TINY_SD, GoCASCFGPipeline
from tests.helpers.defaults import default, forget_constants
from tests.helpers.families import FAMILIES, run, stock_pipeline
from tests.helpers.guided import NEUTRAL, assert_untouched, every_family, guided, pair


PICTURE = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)


def twin(stock, ours: bool):
    """A pipeline on the same modules, with a scheduler and tokenizers of its own: those keep state."""
    own = {name: deepcopy(part) for name, part in stock.components.items() if "token" in name or name == "scheduler"}
    pipe = type(stock)(**{**stock.components, **own})
    pipe.set_progress_bar_config(disable=True)
    return guided(pipe) if ours else pipe


def copied(pipe):
    """What a server makes of its pipeline for each request."""
    mine = copy.copy(pipe)
    for name in pipe.components:
        if "token" in name or name == "scheduler":
            setattr(mine, name, deepcopy(getattr(pipe, name)))
    return mine


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def beside(*works) -> list:
    """What works give, each in a thread of its own, or the error that it raises."""
    found: list = [None] * len(works)

    def run_one(place, work):
        try:
            found[place] = work()
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=run_one, args=item) for item in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


# ---- threads ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kinds", [(True, True, True, True), (True, False, True, False)], ids=["guided beside guided", "beside stock"]
)
@pytest.mark.parametrize("name", ["sd", "flux", "sd3"])
def test_every_call_equals_the_call_alone(name, kinds):
    """diffusers' recipe for servers: one pipeline a thread, on shared modules."""
    stock, seeds = stock_pipeline(name), range(2)
    images = lambda pipe: [run(pipe, name, seed=seed).images for seed in seeds]  # noqa: E731
    alone = {kind: images(twin(stock, kind)) for kind in set(kinds)}
    found = beside(*[lambda kind=kind: images(twin(stock, kind)) for kind in kinds])
    assert [same(a, alone[kind]) for a, kind in zip(found, kinds, strict=True)] == [True] * len(kinds)
    assert_untouched(getattr(stock, FAMILIES[name].denoiser))


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
def test_copies_of_a_pipeline_for_each_request(name):
    """Also those that are made while the pipeline itself is in a call, and whose guidance is plain."""
    stock, pipe = pair(name)
    expected, plain = [[run(p, name, seed=seed).images for seed in range(3)] for p in (pipe, stock)]
    made = []

    def make(itself, *_):
        made.extend([copied(itself), copied(itself)])
        return {}

    run(pipe, name, callback_on_step_end=make)
    of_copies = lambda place, **kwargs: [run(made[place + i], name, seed=i // 2, **kwargs).images for i in (0, 2)]  # noqa: E731
    ours, theirs, base = beside(
        lambda: of_copies(0),
        lambda: of_copies(1, use_scfg=False),
        lambda: [run(pipe, name, seed=seed).images for seed in range(3)],
    )
    assert same(ours, expected[:2])
    assert same(theirs, plain[:2])
    assert same(base, expected)


class Locked:
    """A tokenizer as a server wraps it: one call at a time, and everything else is the tokenizer's."""

    def __init__(self, tokenizer, lock):
        self._tokenizer, self._lock = tokenizer, lock

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, *args, **kwargs):
        with self._lock:
            return self._tokenizer(*args, **kwargs)


@pytest.mark.parametrize("name", ["sd", "flux", "sd3", "hunyuan"])
def test_a_tokenizer_may_be_wrapped(name):
    pipe, lock = guided(stock_pipeline(name)), threading.Lock()
    expected, words = run(pipe, name).images, pipe.words("a cat on grass")
    mine = copy.copy(pipe)
    for part in pipe.components:
        if "tokenizer" in part:
            setattr(mine, part, Locked(getattr(pipe, part), lock))
    assert mine.words("a cat on grass") == words
    assert torch.equal(run(mine, name).images, expected)


@every_family
def test_a_shared_tokenizer_is_asked_as_by_stock(name):
    """It keeps its settings from call to call: others of ours would be taken for theirs by threads beside."""
    asked: list[tuple] = []

    class Noting(Locked):
        def __call__(self, *args, **kwargs):
            asked.append(tuple(kwargs.get(key) for key in ("padding", "truncation", "max_length")))
            return super().__call__(*args, **kwargs)

    stock, pipe = pair(name)
    for part in pipe.components:
        if "tokenizer" in part:
            noting = Noting(getattr(pipe, part), threading.Lock())
            setattr(pipe, part, noting), setattr(stock, part, noting)
    run(stock, name, negative_prompt="a dog")
    theirs = set(asked)
    asked.clear()
    run(pipe, name, negative_prompt="a dog", output_negative_maps=True)
    assert set(asked) == theirs
    asked.clear()
    size = {side: FAMILIES[name].call[side] for side in ("height", "width")}
    pipe.segment(PICTURE, ["cat", "potted plant"], **size)
    pipe.words("a cat on grass")  # both at the pipeline's own length
    assert {settings[:2] for settings in asked} == {settings[:2] for settings in theirs}


@pytest.mark.parametrize("other", ["segment", "discover"])
def test_reading_real_images_beside_generation(other):
    """Each in threads of its own, the guided pipeline's and a stock one."""
    stock = stock_pipeline("sd")
    tasks = {
        "guided": lambda: [run(twin(stock, True), "sd", seed=seed).images for seed in range(3)],
        "stock": lambda: [run(twin(stock, False), "sd", seed=seed).images for seed in range(3)],
        "segment": lambda: [twin(stock, True).segment(PICTURE, ["cat", "grass"]).scores for _ in range(3)],
        "discover": lambda: [twin(stock, True).discover(PICTURE, size=32)[0] for _ in range(2)],
    }
    chosen = [tasks[name] for name in ("guided", "stock", other, other)]
    for found, alone in zip(beside(*chosen), [task() for task in chosen], strict=True):
        assert same(found, alone)


def test_a_half_precision_autoencoder_stays_as_it_is():
    """Reading works in float32 beside another thread that decodes."""
    stock = stock_pipeline("sd")
    stock.vae.half().register_to_config(force_upcast=True)
    pipe, seen = guided(stock), []
    pipe.vae.encoder.conv_in.register_forward_pre_hook(lambda *_: seen.append(stock.vae.dtype))
    weights = [parameter.data_ptr() for parameter in stock.vae.parameters()]
    assert torch.isfinite(pipe.segment(PICTURE, ["cat", "grass"]).scores).all()
    assert seen == [torch.float16]
    assert weights == [parameter.data_ptr() for parameter in stock.vae.parameters()]


def test_another_threads_graphs_are_run():
    """A guided call runs graphs of its own; stock beside it runs those of stock, and compiles nothing."""
    runs: list[int] = []

    def backend(graph, inputs):
        return lambda *args: runs.append(threading.get_ident()) or graph(*args)

    torch.compiler.reset()
    stock = stock_pipeline("sd3")
    stock.transformer = torch.compile(stock.transformer, backend=backend)
    plain, ours = twin(stock, False), twin(stock, True)
    expected = run(plain, "sd3").images, run(ours, "sd3").images
    runs.clear()
    run(plain, "sd3")
    graphs = len(runs)
    runs.clear()

    def other(*_):
        """In the middle of a guided call."""
        found.append(beside(lambda: run(plain, "sd3").images)[0])
        return {}

    found: list = []
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(run(ours, "sd3", callback_on_step_end=other).images, expected[1])
    assert len(found) == 2
    assert all(torch.equal(images, expected[0]) for images in found)
    mine = runs.count(threading.get_ident())
    assert len(runs) - mine == 2 * graphs > 0
    assert mine > 0
    torch.compiler.reset()


# ---- default dtype and device ----------------------------------------------------------------------------------------


@pytest.fixture
def nothing_kept():
    forget_constants()


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype_is_of_no_consequence(name, dtype, nothing_kept):
    """Another thread may set it while it loads a model; nothing that was made meanwhile is kept in it."""
    _, pipe = pair(name)
    with default(dtype):
        neutral = run(pipe, name, scfg=NEUTRAL).images
        assert torch.equal(neutral, run(pipe, name, use_scfg=False).images)
        assert run(pipe, name).images.isfinite().all()
    after = run(pipe, name).images
    forget_constants()
    assert torch.equal(run(pipe, name).images, after)


def test_the_default_dtype_may_change_in_the_middle_of_a_call(nothing_kept):
    """What stock makes in it is the same, and so is what we make."""
    pipe = GoCASCFGPipeline.from_pretrained(TINY_SD)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "height": 16, "width": 16, "output_type": "pt", "output_regions": True}
    generate = lambda **kw: pipe("a cat on grass", generator=torch.Generator().manual_seed(0), **call, **kw)  # noqa: E731

    def change(itself, step, *_):
        torch.set_default_dtype([torch.bfloat16, torch.float64, torch.float32][step])
        return {}

    try:
        changed = generate(callback_on_step_end=change)
    finally:
        torch.set_default_dtype(torch.float32)
    alone = generate()
    assert torch.equal(changed.images, alone.images)
    assert torch.equal(changed.guidance_maps, alone.guidance_maps)
