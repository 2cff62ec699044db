"""Every tiny loop, whichever module here describes it."""

import importlib
import pkgutil

from tests.helpers import loops
from tests.helpers.loops.tiny_loop import TinyLoop


def _found() -> dict[str, TinyLoop]:
    modules = [importlib.import_module(f"{loops.__name__}.{m.name}") for m in pkgutil.iter_modules(loops.__path__)]
    tables = [module.LOOPS for module in modules if hasattr(module, "LOOPS") and module.__name__ != __name__]
    assert sum(map(len, tables)) == len({name for table in tables for name in table})  # each described once
    return {name: loop for table in tables for name, loop in table.items()}


LOOPS: dict[str, TinyLoop] = _found()
