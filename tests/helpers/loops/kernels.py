"""What torch's attention function is given in the layers of a denoiser, while a call of it is repeated."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


Call = tuple[tuple, dict]  # positional arguments, and those by name


def bound(denoiser: torch.nn.Module, call: Call) -> dict[str, Any]:
    """The arguments of a call by name."""
    args, kwargs = call
    _, *given = inspect.signature(type(denoiser).forward).bind_partial(denoiser, *args, **kwargs).arguments.items()
    return dict(given)


def copied(call: Any) -> Any:
    """Arguments whose tensors may be changed."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, call)


class Kernels(TorchFunctionMode):
    """Every call of torch's attention function in some layers of a denoiser, by layer: what it was given, and its `output`.

    `silent`: it answers zeros, so that no token hears of another. `raw`: what `to_q` made in the last call, by layer.
    """

    def __init__(self, denoiser: torch.nn.Module, layers: Sequence[str], silent: bool = False):
        super().__init__()
        self.denoiser, self.layers, self.silent = denoiser, layers, silent
        self.seen: dict[str, list[dict[str, Any]]] = {}
        self.raw: dict[str, Tensor] = {}
        self._running: list[str] = []

    @torch.no_grad()
    def __call__(self, call: Call) -> dict[str, list[dict[str, Any]]]:
        self.seen, self.raw = {name: [] for name in self.layers}, {}
        handles = [handle for name in self.layers for handle in self._hooks(name)]
        args, kwargs = copied(call)
        try:
            with self:
                self.denoiser(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return self.seen

    def _hooks(self, name: str) -> list[Any]:
        layer = self.denoiser.get_submodule(name)
        hooks = [
            layer.register_forward_pre_hook(lambda *_: self._running.append(name)),
            layer.register_forward_hook(lambda *_: self._running.pop() and None),
        ]
        if isinstance(getattr(layer, "to_q", None), torch.nn.Module):
            hooks.append(layer.to_q.register_forward_hook(lambda _, args, output: self.raw.update({name: output})))
        return hooks

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        if self.silent:
            output = given["query"].new_zeros(*given["query"].shape[:-1], given["value"].shape[-1])
        else:
            output = function(*args, **kwargs)
        if self._running:
            self.seen[self._running[-1]].append({**given, "output": output})
        return output
