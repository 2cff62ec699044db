"""Faults put into a call: at a random module, at the scheduler's step, or at the n-th line of the library that runs."""

import ast
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from hypothesis import strategies as st

import goca_guidance
from tests.fuzz.pairs import Pair


LIBRARY = str(Path(goca_guidance.__file__).parent)
CLEANERS = {"__exit__", "close", "forget", "release"}
EFFECTS = {
    "RuntimeError": RuntimeError,
    "KeyboardInterrupt": KeyboardInterrupt,
    "MemoryError": MemoryError,
    "ValueError": ValueError,
}


INJECTED = "injected by the fuzzer"  # the note that its errors bear


@dataclass(frozen=True)
class Fault:
    """Where (`module`, `scheduler`, `line`), which module, at which call or line, and an error's name or `nan`."""

    place: str
    which: int
    when: int
    effect: str

    def error(self) -> BaseException:
        error = EFFECTS[self.effect]("injected")
        error.add_note(INJECTED)
        return error


ERRORS = st.sampled_from(list(EFFECTS))
FAULTS = st.one_of(
    st.builds(Fault, st.just("module"), st.integers(0, 400), st.integers(0, 3), ERRORS | st.just("nan")),
    st.builds(Fault, st.just("scheduler"), st.just(0), st.integers(0, 1), ERRORS | st.just("nan")),
    st.builds(Fault, st.just("line"), st.just(0), st.integers(1, 150) | st.integers(1, 5000), ERRORS),
)


def is_injected(error: BaseException) -> bool:
    """Whether an error is the fuzzer's own."""
    return INJECTED in getattr(error, "__notes__", ())


def injected(pair: Pair, fault: Fault | None):
    """The fault is there for the time of a `with` block."""
    if fault is None:
        return _nothing()
    return {"module": _in_module, "scheduler": _in_scheduler, "line": _at_line}[fault.place](pair, fault)


@contextmanager
def _nothing():
    yield


@contextmanager
def _in_module(pair, fault):
    modules, calls = [m for _, m in pair.modules if not isinstance(m, torch.nn.ModuleList)], []

    def disturb(module, args, output):
        calls.append(None)
        return _effect(fault, output) if len(calls) == fault.when + 1 else None

    hook = modules[fault.which % len(modules)].register_forward_hook(disturb)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _in_scheduler(pair, fault):
    scheduler, calls = pair.ours.scheduler, []

    def step(*args, **kwargs):
        calls.append(None)
        output = type(scheduler).step(scheduler, *args, **kwargs)
        return _effect(fault, output) if len(calls) == fault.when + 1 else output

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


def _effect(fault, output):
    if fault.effect != "nan":
        raise fault.error()
    if isinstance(output, tuple):
        return (_spoiled(output[0]), *output[1:])
    return _spoiled(output) if isinstance(output, torch.Tensor) else output


def _spoiled(value):
    return value * torch.nan if isinstance(value, torch.Tensor) and value.is_floating_point() else value


# ---- at a line -------------------------------------------------------------------------------------------------------
@contextmanager
def _at_line(pair, fault):
    lines = 0

    def local(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        if lines >= fault.when and event == "line" and not _is_cleaning(frame):
            raise fault.error()  # which ends the tracing, too
        return local

    def trace(frame, event, argument):
        return local if frame.f_code.co_filename.startswith(LIBRARY) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def lines():
    """Yields (file, function, line) of each line of the library that runs in the block; None for one that cleans up."""
    found: list[tuple[str, str, int] | None] = []

    def local(frame, event, argument):
        if event == "line":
            code = frame.f_code
            found.append(None if _is_cleaning(frame) else (Path(code.co_filename).name, code.co_name, frame.f_lineno))
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: local if frame.f_code.co_filename.startswith(LIBRARY) else None)
    try:
        yield found
    finally:
        sys.settrace(before)


def _is_cleaning(frame) -> bool:
    """Whether a line, or one that called it, cleans up: where that fails, no program can clean up. So is the head of a `with`:
    Python comes back to it as the block ends, and an error there skips `__exit__`."""
    spared = _heads(frame.f_code.co_filename)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(LIBRARY) and (
            frame.f_code.co_name in CLEANERS or frame.f_lineno in spared | _cleaning(name)
        ):
            return True
        spared, frame = frozenset(), frame.f_back
    return False


@cache
def _nodes(file: str) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(Path(file).read_text())))


@cache
def _cleaning(file: str) -> frozenset[int]:
    """Lines of `finally`."""
    bodies = [each for node in _nodes(file) if isinstance(node, ast.Try) for each in node.finalbody]
    return frozenset(line for each in bodies for line in range(each.lineno, (each.end_lineno or 0) + 1))


@cache
def _heads(file: str) -> frozenset[int]:
    """Lines of `with`."""
    blocks = [node for node in _nodes(file) if isinstance(node, ast.With)]
    return frozenset(line for node in blocks for line in range(node.lineno, node.body[0].lineno))
