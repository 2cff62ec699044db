"""How a cell of the table of features is found: what must hold where a feature works, and where it is refused."""

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from unittest.mock import patch

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

from goca_guidance import GoCASCFGPipeline, GoCASCFGPipelineOutput, SCFGConfig
from goca_guidance.denoisers.adapters import denoiser_of, family_of
from goca_guidance.hooks.guided import GuidedCall
from tests.helpers.families import FAMILIES, run, stock_pipeline
from tests.helpers.guided import guided, hooks_of


ENTERED: dict[str, Callable[[str], str]] = {}  # title of a row: what tries it with a family and returns the cell
WORKS, ABSENT = "works", "not in diffusers"


def feature(title: str):
    """Enter a function in the table."""

    def enter(function):
        ENTERED[title] = function
        return function

    return enter


# ---- what a cell says ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Found:
    """What `check` saw.

    `expected`: the stock pipeline's latents, under the feature. `grams`: by layer, what heads were weighed with.
    """

    pipe: GoCASCFGPipeline
    guided: GoCASCFGPipelineOutput
    expected: torch.Tensor
    grams: dict[str, torch.Tensor]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the first image's regions."""
        return self.guided.regions[0].labels[0]


def check(
    name: str,
    change: Callable = lambda pipe: None,
    *,
    stock: DiffusionPipeline | None = None,
    again: bool = False,
    visible: bool = True,
    alone: bool | None = True,
    steps: int = 2,
    scfg: SCFGConfig | None = None,
    ours: dict | None = None,
    **call,
) -> Found:
    """A feature works: a rate of one is stock bit for bit, any other is not, and every step had regions of real attention.

    Args:
        change: switches the feature on in a pipeline; returns further arguments of the call, if any.
        stock: by default a fresh stock pipeline of the family.
        again: whether `change` is a matter of the pipeline, not of its modules, and our pipeline needs it too.
        visible: whether stock's output under the feature must differ from its output without.
        alone: whether a layer projects its attention to the text alone; None in a graph, which ignores hooks that would look.
        steps: how many are guided.
        scfg, ours: arguments of our guided calls; `call` of all calls.
    """
    stock, scfg, ours = stock or stock_pipeline(name), scfg or SCFGConfig(), ours or {}
    call = call | (change(stock) or {})
    expected = run(stock, name, **call).images
    assert not visible or not torch.equal(expected, plain(name))
    pipe = guided(stock)
    if again:
        change(pipe)
    before = hooks_of(denoiser_of(pipe.components))
    neutral = run(pipe, name, scfg=replace(scfg, rate_min=1, rate_max=1), **ours, **call).images
    with real_attention(pipe, alone) as grams:
        regional = run(pipe, name, scfg=scfg, output_regions=True, **ours, **call)
    assert hooks_of(denoiser_of(pipe.components)) == before
    assert torch.equal(neutral, expected)
    assert not torch.equal(regional.images, expected)
    assert torch.isfinite(regional.images).all()
    assert len(regional.regions) == len(regional.guidance_maps) == steps
    assert all((regions.masks.sum(1) == 1).all() for regions in regional.regions)
    return Found(pipe, regional, expected, grams)


def works(*args, **kwargs) -> str:
    """The cell of a feature of which `check` says everything."""
    check(*args, **kwargs)
    return WORKS


def refused(
    name: str,
    match: str,
    reason: str,
    change: Callable = lambda pipe: None,
    *,
    stock: DiffusionPipeline | None = None,
    fix: Callable | None = None,
    **call,
) -> str:
    """The cell of a feature that stock runs and we refuse; what the error advises is tried.

    `fix` is that, in the pipeline, and returns arguments of the call, if any; `use_scfg=False` must be advised, too.
    """
    stock = stock or stock_pipeline(name)
    change(stock)
    expected = run(stock, name, **call).images
    pipe = guided(stock)
    with pytest.raises((ValueError, RuntimeError), match=f"(?s){match}.*use_scfg=False"):
        run(pipe, name, **call)
    assert torch.equal(run(pipe, name, use_scfg=False, **call).images, expected)
    if fix is not None:
        advised = call | (fix(pipe) or {})
        assert run(pipe, name, output_regions=True, **advised).regions
    return f"refused: {reason}"


def refused_by_diffusers(match: str, reason: str, action: Callable) -> str:
    """The cell of a feature that stock itself does not run."""
    with pytest.raises((ValueError, RuntimeError, AttributeError, TypeError), match=match):
        action()
    return f"refused by diffusers: {reason}"


@contextmanager
def real_attention(pipe, alone: bool | None):
    """All that the method is shown is softmax(q k^T) v, of the very output that the layer projects; yields Gram matrices."""
    grams, projected, on_attention = {}, {}, GuidedCall.on_attention

    def checked(self, record):
        if record.gram is not None:
            grams[record.name] = record.gram
        logits = record.query.float() @ record.key.float().mT * record.scale
        probs = (logits if record.mask is None else logits + record.mask.float()).softmax(-1)
        error = probs @ record.value.float() - record.output.float()
        assert error.norm() / record.output.float().norm() < 8 * torch.finfo(record.output.dtype).eps
        output = record.output.transpose(1, 2).flatten(2)
        if alone and record.name in projected:
            assert any(torch.equal(output, given) for given in projected[record.name])
        on_attention(self, record)

    def before_projection(name):
        return lambda module, args: projected.setdefault(name, []).append(args[0])

    layers = family_of(denoiser_of(pipe.components)).attention_modules.items()
    outward = {name: layer.to_out[0] for name, layer in layers if getattr(layer, "to_out", None) is not None}
    handles = [module.register_forward_pre_hook(before_projection(name)) for name, module in outward.items()]
    try:
        with patch.object(GuidedCall, "on_attention", checked):
            yield grams
    finally:
        for handle in handles:
            handle.remove()
    assert alone is None or set(projected) == set(outward)


# ---- pipelines -------------------------------------------------------------------------------------------------------
def silent(pipe):
    """Without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def plain(name: str) -> torch.Tensor:
    """The stock pipeline's latents for the small call."""
    return run(stock_pipeline(name), name).images


def takes(name: str, argument: str) -> bool:
    """Whether the family's stock pipeline has an argument."""
    return argument in inspect.signature(FAMILIES[name].stock.__call__).parameters


def variant(name: str, kind: str, **component_changes) -> DiffusionPipeline | None:
    """`FluxPipeline` -> a `FluxKontextPipeline`, where diffusers has one."""
    pipeline = getattr(diffusers, FAMILIES[name].stock.__name__.replace("Pipeline", f"{kind}Pipeline"), None)
    return None if pipeline is None else silent(pipeline(**FAMILIES[name].components() | component_changes))


def like_denoiser(name: str, **config_changes) -> dict:
    """The family's denoiser with another configuration, as a component to replace."""
    model = denoiser_of(stock_pipeline(name).components)
    torch.manual_seed(0)
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return {FAMILIES[name].denoiser: type(model)(**config | config_changes).eval()}
