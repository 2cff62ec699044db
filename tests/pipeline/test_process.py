"""What else runs in the process: other threads on the same modules, another default dtype."""

import threading
from copy import deepcopy

import pytest
import torch

from goca_guidance.method import maps
from tests.helpers.families import run, stock_pipeline
from tests.helpers.guided import NEUTRAL, every_family, guided, pair


def twin(stock, ours: bool):
    """A pipeline on the same modules, with a scheduler and tokenizers of its own: those keep state."""
    own = {name: deepcopy(part) for name, part in stock.components.items() if "token" in name or name == "scheduler"}
    pipe = type(stock)(**{**stock.components, **own})
    pipe.set_progress_bar_config(disable=True)
    return guided(pipe) if ours else pipe


@pytest.mark.parametrize(
    "kinds", [(True, True, True, True), (True, False)], ids=["guided beside guided", "beside stock"]
)
@pytest.mark.parametrize("name", ["sd", "flux", "sd3"])
def test_every_call_equals_the_call_alone(name, kinds):
    """diffusers' recipe for servers: one pipeline a thread, on shared modules."""
    stock, seeds = stock_pipeline(name), range(3)
    alone = {kind: [run(twin(stock, kind), name, seed=seed).images for seed in seeds] for kind in set(kinds)}
    found: list[list] = [[] for _ in kinds]

    def work(place, kind):
        pipe = twin(stock, kind)
        found[place] = [run(pipe, name, seed=seed).images for seed in seeds]

    threads = [threading.Thread(target=work, args=item) for item in enumerate(kinds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for images, kind in zip(found, kinds, strict=True):
        assert len(images) == len(seeds)
        assert all(torch.equal(a, b) for a, b in zip(images, alone[kind], strict=True))


@every_family
def test_another_default_dtype_is_of_no_consequence(name):
    """Another thread may set it while it loads a model; nothing that was made meanwhile is kept in it."""
    _, pipe = pair(name)
    expected = run(pipe, name).images
    for constant in (
        maps._gaussian,
        maps.row_mass,
        maps._bilinear_matrix,
        maps.nearest_index,
        maps._read,
        maps.sample,
    ):
        constant.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        neutral = run(pipe, name, scfg=NEUTRAL).images
        assert torch.equal(neutral, run(pipe, name, use_scfg=False).images)
        assert run(pipe, name).images.isfinite().all()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(run(pipe, name).images, expected)
