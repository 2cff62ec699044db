"""One step of a full-size denoiser on a fake CUDA device: no GPU, no weights and no memory are used.

Every tensor is a FakeTensor on "cuda". Counted are launches (operations that are no views, and Triton kernels), bytes read and
written, and live bytes after each operation, by storage, hence the memory that a step needs beyond weights and inputs. An
operation that mixes devices, or waits for the device to read a number, raises in fake mode; copies between host and device
are noted.
"""

import sys
import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from goca_guidance.method import maps


aten = torch.ops.aten
SAME = (
    "detach",
    "lift_fresh",
    "split",
    "unbind",
    "_unsafe_view",
    "alias",
    "sym_size",
    "device",
)  # no memory of their own
EMPTY = ("empty",)  # memory, but nothing is launched
ADDING = ("index_add", "index_put", "index_copy")  # to some places, which are read and written; the rest is not
PICKING = ("gather", "index")  # operations that read of their source only what they pick


@dataclass
class Counts:
    """Of some operations: launches, bytes to and from memory, and the largest tensor that one of them made."""

    launches: int = 0
    bytes: int = 0
    largest: int = 0

    def add(self, moved: Iterable[Tensor], made: Iterable[Tensor] = ()) -> None:
        self.launches += 1
        self.bytes += sum(min(_bytes(x), x.untyped_storage().nbytes()) for x in moved)
        self.largest = max(self.largest, *map(_bytes, made), 0)


@dataclass
class Step:
    """What one step did: the model's operations, ours by line, copies between host and device that we made, and memory."""

    model: Counts = field(default_factory=Counts)
    lines: dict[str, Counts] = field(default_factory=lambda: defaultdict(Counts))
    copies: list[str] = field(default_factory=list)
    peak: int = 0
    held: Counter[str] = field(default_factory=Counter)
    """Bytes that were live at the peak, by the line of ours that made them; "" for the model."""

    @property
    def ours(self) -> Counts:
        """Sums over all lines."""
        every = self.lines.values()
        return Counts(
            sum(line.launches for line in every),
            sum(line.bytes for line in every),
            max((line.largest for line in every), default=0),
        )


class Trace(TorchDispatchMode):
    """Counts operations, those of goca_guidance apart by line, and live memory: `step` since it was last set anew."""

    def __init__(self):
        super().__init__()
        self.live, self._known = 0, {}  # bytes, and line, by storage
        self.step = Step()

    def begin(self) -> Step:
        """Count a new step, to whose memory belongs what the last one left."""
        self.step = Step(peak=self.live)
        return self.step

    def launch(
        self,
        plan,
        read: Sequence[Tensor | None],
        written: Sequence[Tensor | None],
        added: Sequence[Tensor | None] = (),
    ) -> None:
        """In the place of `kernels.launch`: one launch, what is added to is read and written."""
        moved = [x for x in (*read, *written, *added, *added) if x is not None]
        self.step.lines[_line()].add(moved)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        kind = _kind(func)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if kind == "same" or not made:
            return out
        line = _line()
        for x in made:
            self._see(x, line)
        if kind == "empty":
            return out
        given = [x for x in tree_leaves((args, {**(kwargs or {}), "out": None})) if isinstance(x, Tensor)]
        moved = made * 2 if kind == "picking" else given[-1:] * 3 if kind == "adding" else given + made
        (self.step.lines[line] if line else self.step.model).add(moved, made)
        if line and len({x.device.type for x in [*made, *(x for x in given if x.ndim)]}) > 1:
            self.step.copies.append(f"{func} in {line}")
        return out

    def _see(self, x: Tensor, line: str) -> None:
        storage = x.untyped_storage()
        if (key := storage._cdata) in self._known or x.device.type != "cuda":
            return
        self._known[key] = storage.nbytes(), line
        self.live += storage.nbytes()
        if self.live > self.step.peak:
            self.step.peak, self.step.held = self.live, Counter()
            for size, of in self._known.values():
                self.step.held[of] += size
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        size, _ = self._known.pop(key, (0, ""))
        self.live -= size


@cache
def _kind(func) -> str:
    name = str(func)
    if func.is_view or any(part in name for part in SAME):
        return "same"
    kinds = {"empty": EMPTY, "adding": ADDING, "picking": PICKING}
    return next((kind for kind, parts in kinds.items() if any(part in name for part in parts)), "")


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _line() -> str:
    """The innermost line of goca_guidance that asks, where the model's own does not lie further in; "" for the model's.

    A kernel that is watched is the model's.
    """
    frame: Any = sys._getframe(2)
    while frame is not None:
        room, _, name = frame.f_globals.get("__name__", "").partition(".")
        if room == "diffusers":
            return ""
        if room == "goca_guidance" and not frame.f_code.co_qualname.startswith("WatchedKernel"):
            return f"{name}:{frame.f_code.co_qualname}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


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
        with (
            warnings.catch_warnings(),
            patch.object(F, "scaled_dot_product_attention", fused),
            torch.no_grad(),
            mode,
        ):
            warnings.filterwarnings("ignore", "Accessing the data pointer")  # it is the same for all fake tensors
            yield mode
    finally:
        for constant in kept:
            constant.cache_clear()


def to_cuda(module: torch.nn.Module) -> None:
    """Give a module on "meta" fake weights, inside `fake_cuda`."""
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for key, value in table.items():
                if value is not None:
                    fake = fake_like(value)
                    table[key] = torch.nn.Parameter(fake, requires_grad=False) if table is part._parameters else fake


def fake_like(tree: Any) -> Any:
    """Fake tensors in the place of all tensors, inside `fake_cuda`."""

    def fake(x):
        return torch.empty(x.shape, dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x

    return tree_map(fake, tree)
