"""Seeing every attention call of a denoiser without changing it: forward hooks, and wrappers around the kernels.

Processors are never replaced and outputs stay bit-equal. Hooks live for one `with` block. Torch's own kernel is wrapped
only while an observed module runs. Hooks and wrappers are seen by the whole process, and heed their own thread alone.
"""

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from jaxtyping import Float
from torch import Tensor

from goca_guidance.method.records import AttentionRecord, AttentionView


BACKENDS = _AttentionBackendRegistry._backends  # kernels that may never reach torch's function: flash, sage, xformers
TORCH_KERNEL = "scaled_dot_product_attention"
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
PROBE = 64  # length of the probing vectors: the bias added to their images then costs few bits in half precision
_LOCK = threading.Lock()


class AttentionObserver:
    """Hands an `AttentionRecord` of each attention module's text or self-attention call to `receive` while the block runs.

    Args:
        modules: the attention modules to observe, by name.
        receive: called with each record as the network runs; it must not keep more than it needs.
        view: name, number of query tokens and number of key tokens to what they are.
        project: name to the layer's output projection, a function of b n h*d; asked only for `projected` layers.
        raw: names of the layers whose records carry the query before norm and rotary embeddings.

    `projected` names the layers whose records carry the Gram matrix of the output projection, probed once per block: the
    weight may be adapted (LoRA), cast (fp8) or elsewhere (offload), so it is never read. `paused` stops recording without
    removing hooks. `seen` holds the names recorded since it was last cleared.
    """

    def __init__(
        self,
        modules: Mapping[str, Any],
        receive: Callable[[AttentionRecord], None],
        view: Callable[[str, int, int], AttentionView],
        project: Callable[[str], Callable[[Tensor], Tensor]],
        raw: frozenset[str] = frozenset(),
    ):
        self.modules, self.receive, self.view, self.project, self.raw = modules, receive, view, project, raw
        self.projected: frozenset[str] = frozenset()
        self.paused = False
        self.seen: set[str] = set()
        self._grams: dict[str, Tensor] = {}
        self._open: list[_Call] = []

    def __enter__(self) -> "AttentionObserver":
        self._installed, self._thread = ExitStack(), threading.get_ident()
        for name, module in self.modules.items():
            enter, leave = own_thread(lambda *_: self._enter_module()), own_thread(self._leave_module(name))
            self._install(module.register_forward_pre_hook(enter))
            self._install(module.register_forward_hook(leave, always_call=True))
            if name in self.raw and getattr(module, "norm_q", None) is not None:
                self._install(module.norm_q.register_forward_pre_hook(own_thread(self._before_norm)))
        self._installed.callback(_release, BACKENDS, _watch(BACKENDS, list(BACKENDS), self))
        return self

    def __exit__(self, *_) -> None:
        self._installed.close()
        while self._open:
            self._open.pop().close()
        self._grams.clear()

    # ---- hooks -------------------------------------------------------------------------------------------------------
    def _install(self, handle):
        self._installed.callback(handle.remove)

    def _enter_module(self) -> None:
        self._open.append(_Call(None if self.paused else self))

    def _before_norm(self, module, args) -> None:
        if self._open:
            self._open[-1].raw = args[0]

    def _leave_module(self, name: str):
        def leave(module, args, output):
            if not self._open:  # another hook failed before ours began
                return
            call = self._open.pop()
            call.close()
            if output is not None and call.first is not None and not self.paused:
                self.seen.add(name)
                record = self._record(name, call)
                with torch.autocast(record.query.device.type, enabled=False):
                    self.receive(record)

        return leave

    def saw(self, name: str, args: tuple, kwargs: dict, output) -> None:
        """A call of a kernel: torch's own, or one of diffusers' table, whose tokens come before its heads.

        The first call of a module counts; later ones are image prompts (IP-Adapter). Other threads are none of ours.
        """
        if not self._open or self.paused or threading.get_ident() != self._thread or self._open[-1].first is not None:
            return
        arguments, result = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}, output
        if name != TORCH_KERNEL:
            arguments |= {k: arguments[k].transpose(1, 2) for k in ("query", "key", "value")}
            result = (output[0] if isinstance(output, tuple) else output).transpose(1, 2)
        self._open[-1].first = arguments, result

    # ---- records -----------------------------------------------------------------------------------------------------
    def _record(self, name, call) -> AttentionRecord:
        arguments, output = call.first
        query, key, mask = arguments["query"], arguments["key"], arguments.get("attn_mask")
        view = self.view(name, query.shape[2], key.shape[2])
        pixels = view.image if view.joint else slice(None)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., pixels, :]
        scale = arguments.get("scale")
        return AttentionRecord(
            name=name,
            query=query[:, :, pixels],
            key=key,
            value=arguments["value"],
            output=output[:, :, pixels],
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            view=view,
            mask=mask,
            gram=self._gram(name, query) if name in self.projected else None,
            features=call.raw,
        )

    def _gram(self, name, like) -> Tensor:
        """W W^T of the output projection W without bias. Largest entry one."""
        if name not in self._grams:
            projection = output_projection(self.project(name), like)
            gram = projection @ projection.mT
            self._grams[name] = (gram / gram.amax().clamp(min=torch.finfo(gram.dtype).tiny)).to(like.dtype)
        return self._grams[name]


def own_thread(hook: Callable) -> Callable:
    """A module's hook for forwards of this thread alone: others may run pipelines on the same modules."""
    thread = threading.get_ident()
    return lambda *args: hook(*args) if threading.get_ident() == thread else None


def output_projection(project: Callable[[Tensor], Tensor], like: Tensor) -> Float[Tensor, "hd c"]:
    """The matrix without bias, float32: what `project` does to each unit vector, less what it does to zero; `like` b h n d."""
    width = like.shape[1] * like.shape[3]
    probe = torch.eye(width + 1, width, dtype=like.dtype, device=like.device).roll(1, 0) * PROBE
    answer = project(probe[None])[0].float()
    return (answer[1:] - answer[:1]) / PROBE


def check_seen(expected: frozenset[str], seen: set[str]) -> None:
    """Every layer that the method reads was really seen, or an error that names the usual causes."""
    if missing := sorted(expected - seen):
        raise RuntimeError(
            f"Expected attention of {len(expected)} layers, but {len(missing)} of them (first: {missing[0]}) called no "
            "scaled-dot-product attention. Attention slicing, xformers and legacy processors hide it, and caches skip "
            "layers: call `pipe.disable_attention_slicing()`, or set the processors that the model was loaded with "
            "(`pipe.unet.set_attn_processor(AttnProcessor2_0())`; `set_default_attn_processor` sets legacy ones), and switch "
            "caches off, or pass `use_scfg=False`. Linear attention (Sana) has no map to read at all."
        )


class WatchedKernel:
    """A kernel that tells an observer what it computed, and stays behind as a plain call when the observer is gone."""

    def __init__(self, name: str, kernel: Callable, observer: AttentionObserver):
        self.name, self.kernel = name, kernel
        self.__name__ = getattr(kernel, "__name__", name)  # asked for by torch's compiler
        self.observer: AttentionObserver | None = observer

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_dynamo_compiling():  # in another thread: nothing of ours belongs into its graph
            return self.kernel(*args, **kwargs)
        output, observer = self.kernel(*args, **kwargs), self.observer
        if observer is not None:
            observer.saw(self.name, args, kwargs, output)
        return output


def _watch(table: dict, names: list[str], observer: AttentionObserver) -> list[WatchedKernel]:
    with _LOCK:
        kernels = [WatchedKernel(name, table[name], observer) for name in names]
        table.update(zip(names, kernels, strict=True))
    return kernels


def _release(table: dict, kernels: list[WatchedKernel]) -> None:
    """Let the observer go, and take its wrappers off, also from below others': calls in other threads end in any order.

    table["kernel"] -> theirs -> ours -> torch's own: ours comes out by letting theirs call torch's. Where somebody else put a
    function of another kind on top, ours stays below it as a plain call.
    """
    with _LOCK:
        for mine in kernels:
            mine.observer = None
            if table[mine.name] is mine:
                table[mine.name] = mine.kernel
                continue
            outer = table[mine.name]
            while isinstance(outer, WatchedKernel) and outer.kernel is not mine:
                outer = outer.kernel
            if isinstance(outer, WatchedKernel):
                outer.kernel = mine.kernel


class _Call:
    """One running attention module: its first kernel call, and its raw query. Torch's kernel is watched until `close`."""

    def __init__(self, observer: AttentionObserver | None):
        self._kernels = _watch(vars(F), [TORCH_KERNEL], observer) if observer else []
        self.first: tuple[dict, Tensor] | None = None
        self.raw: Tensor | None = None

    def close(self) -> None:
        _release(vars(F), self._kernels)
