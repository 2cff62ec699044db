"""Seeing every attention call of a denoiser without changing it: torch forward hooks and a torch function mode.

Processors are never replaced and outputs stay bit-equal. Hooks live for one `with` block.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from goca_guidance.records import AttentionRecord


PROBE = 64  # length of the probing vectors: the bias added to their images then costs few bits in half precision


class AttentionObserver:
    """Hands an `AttentionRecord` of each attention module's text or self-attention call to `sink` while the block runs.

    Args:
        modules: the attention modules to observe, by name.
        sink: receives each record as the network runs; it must not keep more than it needs.
        grid: number of pixel tokens to (height, width).
        projected: names of the layers whose records carry the output projection, probed once per block: the weight may
            be adapted (LoRA), cast (fp8) or elsewhere (offload), so it is never read.

    `paused` stops recording without removing hooks. `seen` holds the names recorded since it was last cleared.
    """

    def __init__(
        self,
        modules: Mapping[str, torch.nn.Module],
        sink: Callable[[AttentionRecord], None],
        grid: Callable[[int], tuple[int, int]],
        projected: frozenset[str] = frozenset(),
    ):
        self.modules, self.sink, self.grid, self.projected = modules, sink, grid, projected
        self.paused = False
        self.seen: set[str] = set()
        self._projections: dict[str, Tensor] = {}
        self._open: list[tuple[_KernelCalls, ExitStack]] = []

    def __enter__(self) -> "AttentionObserver":
        self._handles = []
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_pre_hook(lambda *_: self._enter_module()))
            self._handles.append(module.register_forward_hook(self._leave_module(name), always_call=True))
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        while self._open:
            self._open.pop()[1].close()
        self._projections.clear()

    def _enter_module(self) -> None:
        stack, kernel = ExitStack(), _KernelCalls()
        if not self.paused:
            stack.enter_context(kernel)
        self._open.append((kernel, stack))

    def _leave_module(self, name: str):
        def leave(module, args, output):
            kernel, stack = self._open.pop()
            stack.close()
            if output is not None and kernel.first is not None:
                self.seen.add(name)
                record = self._record(name, module, *kernel.first)
                with torch.autocast(record.query.device.type, enabled=False):
                    self.sink(record)

        return leave

    def _record(self, name, module, call, output) -> AttentionRecord:
        query, key, scale, mask = call["query"], call["key"], call.get("scale"), call.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        return AttentionRecord(
            name=name,
            query=query,
            key=key,
            value=call["value"],
            output=output,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            grid=self.grid(query.shape[2]),
            mask=mask,
            projection=self._projection(name, module, query) if name in self.projected else None,
        )

    def _projection(self, name, module, like) -> Tensor:
        """The output projection as a matrix [h*d, c] without bias: what it does to zero and to each unit vector."""
        if name not in self._projections:
            width = like.shape[1] * like.shape[3]
            probe = torch.eye(width + 1, width, dtype=like.dtype, device=like.device).roll(1, 0) * PROBE
            answer = module.to_out[0](probe[None])[0].float()
            self._projections[name] = (answer[1:] - answer[:1]) / PROBE
        return self._projections[name]


def check_seen(expected: frozenset[str], seen: set[str]) -> None:
    """Every layer that the method reads was really seen, or an error that names the usual causes."""
    if missing := sorted(expected - seen):
        raise RuntimeError(
            f"Expected attention of {len(expected)} layers, but {len(missing)} of them (first: {missing[0]}) called no "
            "scaled-dot-product attention. Attention slicing, xformers and legacy processors hide it, and caches skip "
            "layers: call `pipe.disable_attention_slicing()` or `pipe.unet.set_default_attn_processor()` and switch "
            "caches off, or pass `use_scfg=False`."
        )


class _KernelCalls(TorchFunctionMode):
    """Keeps the first scaled-dot-product call of an attention module; later ones are image prompts (IP-Adapter)."""

    def __init__(self):
        super().__init__()
        self.first = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention and self.first is None:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            self.first = ({**dict(zip(names, args, strict=False)), **(kwargs or {})}, output)
        return output
