"""Whose calls they are: those of a pipeline's own loop, or of callbacks, hooks and other pipelines that run inside it."""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import CO_NESTED
from types import CodeType, FrameType, FunctionType
from typing import Any


PASSED = (  # modules that call through
    *("torch", "accelerate", "peft", "jaxtyping", "beartype", "diffusers.hooks", "diffusers.models"),
    *("goca_guidance.hooks", "goca_guidance.method"),
)


class OwnCalls:
    """True where the code that asks was called by a pipeline's own functions, from inside `run`, and by nobody between.

    A callback, a hook on a module, a patched scheduler, or another pipeline on the same modules can call the denoiser while
    the loop runs. The stack tells them from the loop: it is walked once for each forward and product.

    Args:
        pipe: the pipeline.
        denoisers: what it calls; a class of one's own may call through.
    """

    def __init__(self, pipe: Any, denoisers: Sequence[Any]):
        self.pipe, self.stranger = pipe, ""
        kinds = tuple(cls for denoiser in denoisers for cls in type(denoiser).__mro__)
        self._methods, self._through = _codes_of(type(pipe).__mro__), _codes_of(kinds)

    def run(self, call: Callable, arguments: Mapping[str, Any]) -> Any:
        """The pipeline's call, inside which own calls are made."""
        return call(**arguments)

    def __call__(self) -> bool:
        """Whether the loop itself is asking; `stranger` names who was, where it was not."""
        called: CodeType | None = None  # by the frame at hand
        for frame in _frames():
            code = frame.f_code
            if code.co_name == "run" and frame.f_globals is globals() and frame.f_locals.get("self") is self:
                return True
            if _passes(frame) or code in self._through:
                continue
            if code not in self._methods or not self._is_ours(frame) or called in _callbacks(frame):
                self.stranger = f"{code.co_name} in {frame.f_globals.get('__name__')}"
                return False
            called = code
        return False

    def _is_ours(self, frame: FrameType) -> bool:
        """Whether a method runs on our pipeline: another one of the same class may run inside the call."""
        names = frame.f_code.co_varnames[:1]
        if not names or frame.f_code.co_flags & CO_NESTED:
            return True
        first = frame.f_locals.get(names[0])
        return first is self.pipe or (isinstance(first, tuple) and bool(first) and first[0] is self.pipe)


def _frames() -> Iterator[FrameType]:
    """The callers of who asks, from the inside out."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _passes(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__") or ""
    return any(module == name or module.startswith(f"{name}.") for name in PASSED)


def _callbacks(frame: FrameType) -> set[CodeType]:
    """What the callbacks that a function was given run: they are not the loop, even where they are the pipeline's methods."""
    values = [value for name, value in frame.f_locals.items() if "callback" in name and callable(value)]
    return {code for code in map(_code_called, values) if code is not None}


def _code_called(callback: Callable) -> CodeType | None:
    while isinstance(callback, functools.partial):
        callback = callback.func
    return getattr(getattr(callback, "__func__", callback), "__code__", None)


@functools.cache
def _codes_of(classes: tuple[type, ...]) -> frozenset[CodeType]:
    """The code of every function that these classes define, decorated and nested ones too."""
    waiting = [member for base in classes if base is not object for member in vars(base).values()]
    functions: dict[int, FunctionType] = {}  # wrappers of one decorator share their code
    while waiting:
        member = waiting.pop()
        function = getattr(member, "fget", getattr(member, "__func__", member))  # a property's, or a class method's
        if isinstance(function, FunctionType) and id(function) not in functions:
            functions[id(function)] = function
            waiting += [
                getattr(cell, "cell_contents", None) for cell in function.__closure__ or ()
            ]  # what is decorated
    return frozenset(code for function in functions.values() for code in _nested(function.__code__))


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
