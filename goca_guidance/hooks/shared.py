"""Hooks and wrappers on what several threads share: modules, kernels, compiled calls. Each heeds its own thread alone."""

import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch


COMPILED = ("forward", "_compiled_call_impl")  # where a module keeps what was compiled: a wrapper's, and its own
_LOCK = threading.Lock()


def hook_here(register: Callable, hook: Callable, **options):
    """`register` a module's hook for forwards of this thread alone: others may run pipelines on the same modules.

    The compiler, which may run in another thread, sees a hook that does nothing.
    """
    thread = threading.get_ident()

    def here(*args):
        if not torch.compiler.is_dynamo_compiling() and threading.get_ident() == thread:
            return hook(*args)

    if dynamo := sys.modules.get("torch._dynamo"):  # a thread that runs graphs compiles what is called between them
        dynamo.eval_frame.skip_code(here.__code__)
    return register(here, **options)


class Wrapper:
    """A function in the place of another one, which it calls: one of a chain, for threads that come and go in any order."""

    def __init__(self, name: str, kernel: Callable):
        self.name, self.kernel = name, kernel
        self.__name__ = getattr(kernel, "__name__", name)  # asked for by torch's compiler

    def retire(self) -> None:
        """Be a plain call from now on."""
        raise NotImplementedError


class EagerHere(Wrapper):
    """A compiled call that runs what was compiled, in one thread: a graph would ignore the hooks."""

    def __init__(self, name: str, kernel: Any):
        super().__init__(name, kernel)
        self.thread: int | None = threading.get_ident()
        self._torchdynamo_orig_callable = kernel._torchdynamo_orig_callable  # as whatever torch compiled has it

    def retire(self) -> None:
        self.thread = None

    def __call__(self, *args, **kwargs):
        if not torch.compiler.is_dynamo_compiling() and threading.get_ident() == self.thread:
            return self.here(*args, **kwargs)
        return self.kernel(*args, **kwargs)

    def here(self, *args, **kwargs):
        """The call in this thread."""
        return self._torchdynamo_orig_callable(*args, **kwargs)


def compiled_names(module: torch.nn.Module) -> list[str]:
    """Where a module keeps what was compiled of itself."""
    return [name for name in COMPILED if hasattr(vars(module).get(name), "_torchdynamo_orig_callable")]


@contextmanager
def compiled_calls(modules: Iterable[torch.nn.Module], make: Callable[[torch.nn.Module, str, Any], EagerHere]):
    """What is compiled of the modules is replaced in this thread; `make` is given a module, a name and the compiled call."""
    with ExitStack() as stack:
        for module in modules:
            wrappers: list[Wrapper] = []
            stack.callback(release, vars(module), wrappers)
            wrap(vars(module), compiled_names(module), partial(make, module), wrappers)
        yield


def eager_here(modules: Iterable[torch.nn.Module]):
    """What of the modules is compiled, or inside them, runs eagerly in this thread, and in the others as it would."""
    inside = {id(m): m for module in modules for m in module.modules()}
    return compiled_calls(inside.values(), lambda _, name, kernel: EagerHere(name, kernel))


def wrap(table: dict, names: list, make: Callable[[Any, Callable], Wrapper], wrappers: list[Wrapper]) -> None:
    """Put wrappers in the place of functions of a table.

    They are appended to `wrappers`, a list that whoever releases them holds before: an interruption may come at any line.
    """
    with _LOCK:
        new = [make(name, table[name]) for name in names]
        wrappers += new
        table.update(zip(names, new, strict=True))


def release(table: dict, wrappers: list[Wrapper]) -> None:
    """Retire wrappers of ours, and take them off, also from below others': calls in other threads end in any order.

    table["kernel"] -> theirs -> ours -> torch's own: ours comes out by letting theirs call torch's. Where somebody else put a
    function of another kind on top, ours stays below it as a plain call.
    """
    with _LOCK:
        for mine in wrappers:
            mine.retire()
            if table.get(mine.name) is mine:
                table[mine.name] = mine.kernel
                continue
            outer = table.get(mine.name)
            while isinstance(outer, Wrapper) and outer.kernel is not mine:
                outer = outer.kernel
            if isinstance(outer, Wrapper):
                outer.kernel = mine.kernel
