"""Fused kernels on the CPU: in Triton's interpreter, in any process, and undone afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from goca_guidance.method import kernels


@contextmanager
def interpreted() -> Iterator[None]:
    """Kernels are on, and the interpreter runs them.

    It looks at `TRITON_INTERPRET` where functions are decorated, Triton's own among them. Triton may have been imported
    before, so its compiled functions are replaced, and all that the interpreter changes in it is put back.
    """
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, _patch_lang
    from triton.runtime.jit import JITFunction

    from goca_guidance.method import triton_kernels

    if not hasattr(interpreter, "_LangPatchScope"):
        pytest.skip("what the interpreter of this Triton changes cannot be put back")
    with pytest.MonkeyPatch.context() as patch, switched("1"):
        patch.setenv("TRITON_INTERPRET", "1")
        found: dict = {}
        for module in (tl, tl.standard, triton_kernels):
            for name, function in vars(module).copy().items():
                if isinstance(function, JITFunction):
                    patch.setattr(module, name, found.setdefault(function.fn, InterpretedFunction(function.fn)))
        changed = _patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        try:
            yield
        finally:
            changed.restore()


@contextmanager
def switched(value: str | None) -> Iterator[None]:
    """`GOCA_TRITON` is so, or not set, and nothing is remembered of before, nor afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOCA_TRITON", value) if value else patch.delenv("GOCA_TRITON", raising=False)
        _forget()
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    for remembering in (kernels.enabled, kernels._lacking, kernels._warn):
        remembering.cache_clear()
    kernels._failed.clear()
    kernels._ready.clear()
