"""One step of a full-size denoiser on a fake CUDA device: no GPU, no weights and no memory are used.

Every tensor is a FakeTensor on "cuda". Counted are kernels (operations that are no views), bytes read and written, and live
bytes after each operation, by storage, hence the memory that a step needs beyond weights and inputs.
"""

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from goca_guidance.method import maps


aten = torch.ops.aten
FREE = ("empty", "detach", "lift_fresh", "split", "unbind", "_unsafe_view", "alias", "sym_size", "device")
PICKING = ("gather", "index")  # operations that read of their source only what they pick


@dataclass
class Counts:
    """Of some operations: kernels, bytes to and from memory, and the largest tensor that one of them made."""

    kernels: int = 0
    bytes: int = 0
    largest: int = 0


class Trace(TorchDispatchMode):
    """Counts a step's operations, those of goca_guidance apart, and its live memory."""

    def __init__(self):
        super().__init__()
        self.model, self.ours = Counts(), Counts()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        if func.is_view or any(part in str(func) for part in FREE) or not made:
            return out
        for x in made:
            self._see(x)
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        moved = made * 2 if any(part in str(func) for part in PICKING) else given + made
        counts = self.ours if _is_ours() else self.model
        counts.kernels += 1
        counts.bytes += sum(min(_bytes(x), x.untyped_storage().nbytes()) for x in moved)
        counts.largest = max(counts.largest, *map(_bytes, made))
        return out

    def _see(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if (key := storage._cdata) in self._known:
            return
        self._known[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _is_ours() -> bool:
    """Whether a line of goca_guidance asked, and not the kernel that it watches."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("goca_guidance."):
            return not frame.f_code.co_qualname.startswith("WatchedKernel")
        frame = frame.f_back
    return False


def fused(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What CUDA would call: in fake mode torch chooses the form that stores the probabilities."""
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, False, dropout_p, is_causal, scale=scale
    )[0]


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Fake tensors inside; the method's constants, which are kept for the process, are neither found nor left there."""
    kept = [value for value in vars(maps).values() if hasattr(value, "cache_clear")]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for constant in kept:
        constant.cache_clear()
    try:
        with patch.object(F, "scaled_dot_product_attention", fused), torch.no_grad(), mode:
            yield mode
    finally:
        for constant in kept:
            constant.cache_clear()


def build(create: Callable[[], torch.nn.Module], dtype: torch.dtype) -> torch.nn.Module:
    """A module with fake weights, inside `fake_cuda`."""
    with torch.device("meta"):
        module = create().eval()
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for key, value in table.items():
                if value is not None:
                    kind = dtype if value.is_floating_point() else value.dtype
                    fake = torch.empty(value.shape, dtype=kind, device="cuda")
                    table[key] = torch.nn.Parameter(fake, requires_grad=False) if table is part._parameters else fake
    return module


def on_cuda(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a call, their tensors fake and floating ones of a dtype, inside `fake_cuda`."""

    def fake(x):
        if not isinstance(x, Tensor):
            return x
        return torch.empty(x.shape, dtype=dtype if x.is_floating_point() else x.dtype, device="cuda")

    return tree_map(fake, arguments)
