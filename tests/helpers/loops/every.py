"""Every tiny loop, whichever module here describes it, and its stock pipeline, built and run once in a process."""

import importlib
import pkgutil
from functools import cache

import diffusers
from torch import Tensor

from tests.helpers import loops
from tests.helpers.loops.tiny_loop import TinyLoop, build, run
from tests.helpers.loops.trace import Step, latents, traced


def _found() -> dict[str, TinyLoop]:
    modules = [importlib.import_module(f"{loops.__name__}.{m.name}") for m in pkgutil.iter_modules(loops.__path__)]
    tables = [module.LOOPS for module in modules if hasattr(module, "LOOPS") and module.__name__ != __name__]
    assert sum(map(len, tables)) == len({name for table in tables for name in table})  # each described once
    return {name: loop for table in tables for name, loop in table.items()}


LOOPS: dict[str, TinyLoop] = _found()


@cache
def stock(name: str) -> diffusers.DiffusionPipeline:
    """One for all who change nothing in it."""
    return build(name, LOOPS[name])


@cache
def stock_call(name: str) -> tuple[Tensor, list[Step]]:
    """Latents and steps of the stock pipeline's small call."""
    output, steps = traced(run, stock(name), LOOPS[name])
    return latents(output), steps
