"""Seeing every attention call of a denoiser without changing it: forward hooks, and wrappers around the kernels.

Processors are never replaced and outputs stay bit-equal. Hooks live for one `with` block. Torch's own kernel is wrapped
only while an observed module runs. Hooks and wrappers are seen by the whole process, and heed their own thread alone.
"""

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention, MochiAttention
from jaxtyping import Float, Int
from torch import Tensor

from goca_guidance.hooks.log_sum_exp import LogSumExp, wanted
from goca_guidance.hooks.shared import Wrapper, hook_here, release, wrap
from goca_guidance.method.records import AttentionRecord, AttentionView


BACKENDS = _AttentionBackendRegistry._backends  # kernels that may never reach torch's function: flash, sage, xformers
TORCH_KERNEL = "scaled_dot_product_attention"
OWN, OTHER = ("hidden_states", "norm_hidden_states"), ("encoder_hidden_states", "norm_encoder_hidden_states")
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
PROBE = 64  # length of the probing vectors: the bias added to their images then costs few bits in half precision


class AttentionObserver:
    """Hands an `AttentionRecord` of each attention module's text or self-attention call to `receive` while the block runs.

    Args:
        modules: the attention modules to observe, by name.
        receive: called with each record as the network runs; it must not keep more than it needs.
        view: name, number of query tokens and number of key tokens to what they are; None where they are not the layer's.
        project: name to the layer's output projection, a function of b n h*d; asked only for `projected` layers.
        raw: names of the layers whose records carry the query before norm and rotary embeddings.
        segmented: whether a module calls its kernel for one segment of the queries after the other, the pixels' last.

    `projected` names the layers whose records carry the Gram matrix of the output projection, probed once per block: the
    weight may be adapted (LoRA), cast (fp8) or elsewhere (offload), so it is never read. `paused` stops recording without
    removing hooks. `seen` holds the names recorded since it was last cleared. `images`, where it is known, is how many the
    denoiser predicts. Attention that is computed in parts (see `Asked`) is not recorded.
    """

    def __init__(
        self,
        modules: Mapping[str, Any],
        receive: Callable[[AttentionRecord], None],
        view: Callable[[str, int, int], AttentionView | None],
        project: Callable[[str], Callable[[Tensor], Tensor]],
        raw: frozenset[str] = frozenset(),
        segmented: bool = False,
    ):
        self.modules, self.receive, self.view, self.project, self.raw = modules, receive, view, project, raw
        self.segmented, self.lse = segmented, wanted()
        self.projected: frozenset[str] = frozenset()
        self.paused = False
        self.images: int | None = None
        self.seen: set[str] = set()
        self._grams: dict[str, Tensor] = {}
        self._open: list[_Call] = []

    def __enter__(self) -> "AttentionObserver":
        self._installed, self._thread = ExitStack(), threading.get_ident()
        try:  # `__exit__` is not called where this is interrupted
            for name, module in self.modules.items():
                self._install(module.register_forward_pre_hook, self._enter_module, with_kwargs=True)
                self._install(module.register_forward_hook, self._leave_module(name))
                if name in self.raw and getattr(module, "norm_q", None) is not None:
                    self._install(module.norm_q.register_forward_pre_hook, self._before_norm)
            kernels: list[Wrapper] = []
            self._installed.callback(release, BACKENDS, kernels)
            self.watch(BACKENDS, list(BACKENDS), kernels)
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_) -> None:
        self._installed.close()
        while self._open:
            self._open.pop().close()
        self._grams.clear()

    # ---- hooks -------------------------------------------------------------------------------------------------------
    def _install(self, register, hook, **options):
        self._installed.callback(hook_here(register, hook, **options).remove)

    def _enter_module(self, module, args, kwargs) -> None:
        call = _Call(Asked.of(module, args, kwargs))
        self._open.append(call)
        if not self.paused:
            self.watch(vars(F), [TORCH_KERNEL], call.kernels)

    def _before_norm(self, module, args) -> None:
        if self._open:
            self._open[-1].raw = args[0]

    def _leave_module(self, name: str):
        def leave(module, args, output):
            if not self._open:  # another hook failed before ours began
                return
            call = self._open[-1]
            call.close()
            self._open.pop()
            record = None if output is None or self.paused else self._record(name, call)
            if record is not None:
                self._hand(record)

        return leave

    def _hand(self, record: AttentionRecord) -> None:
        self.seen.add(record.name)
        device = record.query.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            self.receive(record)

    def tell(self, calls: Mapping[str, "TracedCall"]) -> bool:
        """Hand over what modules computed in a graph; False, and none of it, where one's attention is not known."""
        if not self.paused:
            found = [self._record(name, call) for name, call in calls.items()]
            records = [record for record in found if record is not None]
            if len(records) < len(found):
                return False
            for record in records:
                self._hand(record)
        return True

    def watch(self, table: dict, names: list, wrappers: list[Wrapper]) -> None:
        """Let kernels of a table tell what they compute; `wrappers` is filled with what is to be released."""
        wrap(table, names, lambda name, kernel: WatchedKernel(name, kernel, self), wrappers)

    def running(self) -> "_Call | None":
        """The attention module that runs and is recorded, in this thread; others are none of ours."""
        mine = self._open and not self.paused and threading.get_ident() == self._thread
        return self._open[-1] if mine else None

    # ---- records -----------------------------------------------------------------------------------------------------
    def _record(self, name, call) -> AttentionRecord | None:
        """None where the kernel was not called, or saw a part of what the module was asked for."""
        found = self._found(name, call)
        if found is None:
            return None
        arguments, output, view = found
        if view.order is not None:
            arguments, output = laid_out(arguments, output, view.order)
        query, key, mask = arguments["query"], arguments["key"], arguments.get("attn_mask")
        laid_out_alike = view.image.stop and query.shape[2] == key.shape[2]
        pixels = view.queries or (view.image if laid_out_alike else slice(None))
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., pixels, :]
        scale = arguments.get("scale")
        return AttentionRecord(
            name=name,
            query=_rows(query, pixels),
            key=key,
            value=arguments["value"],
            output=_rows(output, pixels),
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            view=view if view.order is None else replace(view, order=None),
            mask=mask,
            gram=self._gram(name, query) if name in self.projected else None,
            features=None if call.raw is None else _pixels_of(call.raw, query, pixels),
            lse=None if arguments["lse"] is None else _rows(arguments["lse"], pixels),
        )

    def _found(self, name, call) -> tuple[dict, Tensor, AttentionView] | None:
        """The first kernel call that the view knows; before it, pictures beside the text may have been asked (Wan)."""
        for arguments, output in (call.last if self.segmented else call.whole)(self.images):
            view = self.view(name, arguments["query"].shape[2], arguments["key"].shape[2])
            if view is not None:
                return arguments, output, view
        return None

    def _gram(self, name, like) -> Tensor:
        """W W^T of the output projection W without bias. Largest entry one."""
        if name not in self._grams:
            projection = output_projection(self.project(name), like)
            gram = projection @ projection.mT
            self._grams[name] = (gram / gram.amax().clamp(min=torch.finfo(gram.dtype).tiny)).to(like.dtype)
        return self._grams[name]


def _rows(x: Float[Tensor, "b h n ..."], pixels: slice) -> Float[Tensor, "b h p ..."]:
    """The pixels' rows; `x` itself where those are all: slices of each layer add up on the host."""
    return x if pixels.indices(x.shape[2]) == (0, x.shape[2], 1) else x[:, :, pixels]


def _pixels_of(raw: Tensor, query: Float[Tensor, "b h n d"], pixels: slice) -> Float[Tensor, "b h p d"]:
    """Those of a projection b n h*d, b n h d or b h n d, of all tokens that ask or of the pixels alone."""
    heads = query.shape[1]
    if raw.ndim == 3:
        raw = raw.unflatten(2, (heads, -1))
    raw = raw if raw.shape[1] == heads else raw.transpose(1, 2)
    return _rows(raw, pixels) if raw.shape[2] == query.shape[2] else raw


def laid_out(arguments: dict, output: Tensor, order: Int[Tensor, "b n"]) -> tuple[dict, Tensor]:
    """A kernel's tokens b h n d in another order for each image; queries too, unless they are the pixels alone."""
    own = output.shape[2] == order.shape[1]
    columns, mask = order[:, None, :, None], arguments.get("attn_mask")
    there = [name for name in ("key", "value", *(["query"] if own else [])) if arguments[name] is not None]
    changed = {name: arguments[name].take_along_dim(columns, 2) for name in there}
    if own and arguments["lse"] is not None:
        changed["lse"] = arguments["lse"].take_along_dim(order[:, None], 2)
    if mask is not None:
        mask = mask.expand(len(order), *mask.shape[1:]).take_along_dim(order[:, None, None], 3)
        changed["attn_mask"] = mask.take_along_dim(columns, 2) if own and mask.shape[2] > 1 else mask
    return arguments | changed, output.take_along_dim(columns, 2) if own else output


def output_projection(project: Callable[[Tensor], Tensor], like: Tensor) -> Float[Tensor, "hd c"]:
    """The matrix without bias, float32: what `project` does to each unit vector, less what it does to zero; `like` b h n d."""
    width = like.shape[1] * like.shape[3]
    probe = torch.eye(width + 1, width, dtype=like.dtype, device=like.device).roll(1, 0) * PROBE
    answer = project(probe[None])[0].float()
    return (answer[1:] - answer[:1]) / PROBE


def check_seen(expected: Iterable[str], seen: set[str]) -> None:
    """Every layer that the method reads was really seen, or an error that names the usual causes."""
    if missing := sorted(set(expected) - seen):
        raise RuntimeError(
            f"Expected attention of {len(set(expected))} layers, but {len(missing)} of them (first: {missing[0]}) called no "
            "scaled-dot-product attention of all their images, heads and tokens. Attention slicing, xformers and legacy "
            "processors hide it, tiles, merged tokens and chunks split it, and caches skip layers: call "
            "`pipe.disable_attention_slicing()`, or set the processors that the model was loaded with "
            "(`pipe.unet.set_attn_processor(AttnProcessor2_0())`; `set_default_attn_processor` sets legacy ones), and switch "
            "tiles, token merging and caches off."
        )


@cache
def _parameters(kind: Any) -> tuple[str, ...]:
    """Names of what a module's forward takes, in order."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _heads(module: Any) -> int | None:
    """How many heads an attention module says that it has."""
    heads = getattr(module, "heads", None)
    return getattr(module, "num_heads", None) if heads is None else heads


@dataclass(frozen=True)
class Asked:
    """What an attention module was asked for: so many images, heads, tokens of its own, and tokens to attend to, if any.

    A kernel that got fewer saw a part: a tile of the picture, merged tokens, a chunk of the batch or of the keys, one head.
    `Attention` of diffusers takes pixels as b c H W too.
    """

    images: int
    heads: int | None
    own: int
    other: int
    by_image: bool = False  # Mochi asks for each image by itself

    @classmethod
    def of(cls, module, args: tuple, kwargs: dict) -> "Asked | None":
        """Read off the arguments; None where they are not those of diffusers' attention."""
        kind: Any = type(module)
        given = dict(zip(_parameters(kind), args, strict=False)) | kwargs
        own, other = (next((given[n] for n in names if n in given), None) for names in (OWN, OTHER))
        other = other[0] if isinstance(other, (tuple, list)) else other  # beside image prompts (IP-Adapter)
        if not isinstance(own, Tensor) or (other is not None and len(other) != len(own)):
            return None
        heads = _heads(module)
        tokens = own.shape[2:] if own.ndim == 4 and isinstance(module, Attention) else own.shape[1:-1]
        others = 0 if other is None else other.shape[1]
        return cls(len(own), heads, tokens.numel(), others, isinstance(module, MochiAttention))

    def answered(self, query: Tensor, key: Tensor, output: Tensor) -> bool:
        """Whether a kernel's call is all of it: b h n d each; keys are the others, one's own, or both (joint attention).

        Both may be asked by one's own tokens alone.
        """
        if query.ndim != 4 or query.shape[:2] != key.shape[:2] or output.shape[:3] != query.shape[:3]:
            return False
        both = self.own + self.other
        return (
            query.shape[0] == self.images
            and query.shape[1] == (self.heads or query.shape[1])
            and (query.shape[2], key.shape[2]) in {(self.own, self.other or self.own), (self.own, both), (both, both)}
        )


class WatchedKernel(Wrapper):
    """A kernel that tells an observer what it computed, and stays behind as a plain call when the observer is gone."""

    def __init__(self, name: str, kernel: Callable, observer: AttentionObserver):
        super().__init__(name, kernel)
        self.observer: AttentionObserver | None = observer

    def retire(self) -> None:
        self.observer = None

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_dynamo_compiling():  # in another thread: nothing of ours belongs into its graph
            return self.kernel(*args, **kwargs)
        observer = self.observer
        if observer is None or (call := observer.running()) is None:
            return self.kernel(*args, **kwargs)
        since = len(call.calls)
        with LogSumExp() if observer.lse and self.name == TORCH_KERNEL else nullcontext() as told:
            output = self.kernel(*args, **kwargs)
        call.note(since, self.name, args, kwargs, output, told and told.found)
        return output


class _Call:
    """One running attention module: its kernel calls, and its raw query. Torch's kernel is watched until `close`.

    One kernel call counts; others are image prompts (IP-Adapter), unless they are like it.
    """

    def __init__(self, asked: Asked | None):
        self.kernels: list[Wrapper] = []
        self._asked = asked
        self.calls: list[tuple[dict, Tensor]] = []  # arguments and output
        self.raw: Tensor | None = None

    def note(self, since: int, name: str, args: tuple, kwargs: dict, output, lse: Tensor | None) -> None:
        """A kernel was called: torch's own, or one of diffusers' table, whose tokens come before its heads.

        Calls from `since` on were made within this one, which puts them together; a single one of its sizes is the same call.
        """
        arguments = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs, "lse": lse}
        if name != TORCH_KERNEL:
            arguments |= {k: arguments[k].transpose(1, 2) for k in ("query", "key", "value")}
            output = (output[0] if isinstance(output, tuple) else output).transpose(1, 2)
        if [_sizes(call) for call, _ in self.calls[since:]] != [_sizes(arguments)]:
            self.calls[since:] = [(arguments, output)]

    def whole(self, images: int | None) -> Iterator[tuple[dict, Tensor]]:
        """Kernel calls that are all that the module was asked for, for so many images if that is known."""
        asked = self._asked
        if asked is None or images not in (None, asked.images):
            return
        if asked.by_image and len(self.calls) == asked.images:
            self.calls = [_together(self.calls, asked.own + asked.other)]
        sizes = [_sizes(arguments) for arguments, _ in self.calls]
        split = (
            len(set(sizes)) > 1 and sum(keys[2] for _, keys in sizes) == asked.other
        )  # a picture's tokens, the text's
        for arguments, output in self.calls:
            alone, query, key = sizes.count(_sizes(arguments)) == 1, arguments["query"], arguments["key"]
            if alone and (replace(asked, other=key.shape[2]) if split else asked).answered(query, key, output):
                yield arguments, output

    def last(self, images: int | None) -> Iterator[tuple[dict, Tensor]]:
        """The last kernel call, if it is of all images and heads; what its tokens are, a view says."""
        for arguments, output in self.calls[-1:]:
            query, heads = arguments["query"], None if self._asked is None else self._asked.heads
            if images in (None, len(query)) and query.shape[1] == (heads or query.shape[1]):
                yield arguments, output

    def close(self) -> None:
        release(vars(F), self.kernels)


class TracedCall(_Call):
    """The kernel calls of an attention module in a graph, which does not show what the module was asked for.

    One that a view knows is all of its tokens, if it is of all images and heads, and none is like it.
    """

    def __init__(self, module: Any):
        self._unseen = Asked(0, _heads(module), 0, 0)
        super().__init__(self._unseen)

    def whole(self, images: int | None) -> Iterator[tuple[dict, Tensor]]:
        sizes = [_sizes(arguments) for arguments, _ in self.calls]
        for arguments, output in self.calls:
            query, key = arguments["query"], arguments["key"]
            asked = replace(self._unseen, images=images or len(query), own=query.shape[2], other=key.shape[2])
            if sizes.count(_sizes(arguments)) == 1 and asked.answered(query, key, output):
                yield arguments, output


def _together(calls: list[tuple[dict, Tensor]], tokens: int) -> tuple[dict, Tensor]:
    """Calls for one image each as a call for all of them: what lacks of so many tokens is filled up, and masked as keys."""

    def filled(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, tokens - x.shape[2]))

    made = {name: torch.cat([filled(arguments[name]) for arguments, _ in calls]) for name in ("query", "key", "value")}
    masks = [x["key"].new_zeros(1, 1, 1, x["key"].shape[2]) for x, _ in calls]
    made["attn_mask"] = torch.cat([F.pad(m, (0, tokens - m.shape[3]), value=-torch.inf) for m in masks])
    return calls[0][0] | made | {"lse": None}, torch.cat([filled(output) for _, output in calls])


def _sizes(arguments: dict) -> tuple[torch.Size, torch.Size]:
    return arguments["query"].shape, arguments["key"].shape
