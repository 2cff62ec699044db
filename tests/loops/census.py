"""Every pipeline of diffusers whose loop mixes two predictions, and whether regions guide it: counted from diffusers."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin

from goca_guidance.denoisers.adapters import family_of
from goca_guidance.pipeline import guided as guided_class
from tests.helpers import families
from tests.helpers.guided import NEUTRAL, guided, hooks_of
from tests.helpers.loops import tiny_loop
from tests.helpers.loops.every import LOOPS
from tests.helpers.loops.trace import denoisers, latents


WORKS = "works"
REGIONS = {"cat": [1], "grass": [3], "</s>": [4]}  # where a tiny pipeline is called with embeddings
SERVED = {family.stock.__name__: name for name, family in families.FAMILIES.items()}  # tiny ones of seven families
VARIANTS = {  # and of their tasks
    f"{family.stock.__name__.removesuffix('Pipeline')}{kind}Pipeline": (make, name)
    for kind, make in {
        "Img2Img": families.image_to_image,
        "Inpaint": families.inpaint,
        "ControlNet": families.controlnet,
    }.items()
    for name, family in families.FAMILIES.items()
}
THIRD = (
    "pag_scale",
    "image_guidance_scale",
    "img_guidance_scale",
    "edit_guidance_scale",
)  # arguments of a third prediction


# ---- what diffusers has ----------------------------------------------------------------------------------------------
def pipelines() -> Iterator[tuple[str, type[DiffusionPipeline]]]:
    """Every pipeline class that is not deprecated, by name."""
    for name in sorted(dir(diffusers)):
        found = getattr(diffusers, name) if "Pipeline" in name else None
        if isinstance(found, type) and issubclass(found, DiffusionPipeline) and found.__name__ == name:
            rooms = found.__module__.split(".")
            if rooms[:2] == ["diffusers", "pipelines"] and len(rooms) > 3 and "deprecated" not in rooms:
                yield name, found


@cache
def mixes(pipeline: type[DiffusionPipeline]) -> bool:
    """Whether its source mixes two predictions by a guidance scale: scale x difference, a lerp, or a sum with two weights."""
    arguments = inspect.signature(pipeline.__call__).parameters
    if any(name in arguments for name in THIRD) or not any(_is_scale(name) for name in arguments):
        return False
    nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(pipeline)))))
    products = [node for node in nodes if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)]
    pairs = [pair for node in products for pair in ((node.left, node.right), (node.right, node.left))]
    lerps = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("lerp")]
    differences = [scale for scale, other in pairs if isinstance(other, ast.BinOp) and isinstance(other.op, ast.Sub)]
    weights = [ast.unparse(scale) for scale, _ in pairs]
    return (
        any(map(_scales, [*differences, *(node.args[-1] for node in lerps)]))
        or "guidance_scale + 1.0" in weights
        or "1.0 - gw_i" in weights
    )


def _is_scale(name: str) -> bool:
    return any(part in name for part in ("guidance_scale", "cfg_scale", "guidance_schedule"))


def _scales(node: ast.AST) -> bool:
    """Whether an expression is a guidance scale, perhaps less a number."""
    names = [
        n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node) if isinstance(n, (ast.Name, ast.Attribute))
    ]
    return any(map(_is_scale, names)) and not any(isinstance(n, ast.Call) for n in ast.walk(node))


# ---- what ours does with it ------------------------------------------------------------------------------------------
@cache
def verdict(name: str) -> str:
    """`WORKS`, or "refused: " and the reason that a user is told.

    It works where a rate of one is the stock pipeline bit for bit, any other is not, every mixing step had regions, and no
    hook is left.
    """
    try:
        stock, call, steps = _tiny(name)
    except LookupError:
        return f"refused: {_refusal(getattr(diffusers, name))}"
    expected = latents(call(stock))
    try:
        pipe = guided(stock)
        ours = {} if name not in LOOPS or LOOPS[name].words else {"region_tokens": REGIONS}
        neutral, output = latents(call(pipe, scfg=NEUTRAL, **ours)), call(pipe, output_regions=True, **ours)
    except (ValueError, RuntimeError, TypeError) as error:
        return f"refused: {error}"
    assert torch.equal(neutral, expected), name
    assert not torch.equal(latents(output), expected), name
    assert len(output["regions"]) == len(output["guidance_maps"]) == steps, name
    assert not any(map(hooks_of, denoisers(pipe))), name
    return WORKS


def _tiny(name: str) -> tuple[DiffusionPipeline, Any, int]:
    """A tiny stock pipeline, how it or ours is called, and how many steps mix."""
    if name in LOOPS and LOOPS[name].guided:
        loop = LOOPS[name]
        return tiny_loop.build(name, loop), lambda pipe, **k: tiny_loop.run(pipe, loop, **k), loop.guided
    if name in SERVED:
        return families.stock_pipeline(SERVED[name]), lambda pipe, **k: families.run(pipe, SERVED[name], **k), 2
    make, family = VARIANTS[name]
    stock, arguments = make(family)
    return stock, lambda pipe, **k: families.run(pipe, family, **arguments | k), 2


def _refusal(pipeline: type[DiffusionPipeline]) -> str:
    """What a user is told of a pipeline that has no tiny one: by its class, or by its denoiser's."""
    try:
        guided_class(pipeline)
        for kind in _denoisers(pipeline):
            with torch.device("meta"):
                _ = family_of(kind()).preset
    except ValueError as error:
        return str(error)
    raise LookupError(f"Expected a tiny pipeline, or a refusal, for {pipeline.__name__}, but it has neither.")


def _denoisers(pipeline: type[DiffusionPipeline]) -> Iterator[type[ModelMixin]]:
    """The classes of the denoisers that a pipeline is made with."""
    for name, parameter in inspect.signature(pipeline.__init__).parameters.items():
        if name in ("unet", "transformer", "prior", "decoder"):
            kinds = getattr(parameter.annotation, "__args__", [parameter.annotation])
            yield from (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, ModelMixin))


def count() -> dict[str, Any]:
    """The mixing pipelines: how many, which work, and why the others are refused."""
    verdicts = {name: verdict(name) for name, found in pipelines() if mixes(found)}
    works = [name for name, said in verdicts.items() if said == WORKS]
    refused = {name: said.removeprefix("refused: ") for name, said in verdicts.items() if said != WORKS}
    return {"mixing": len(verdicts), "works": works, "refused": refused}
