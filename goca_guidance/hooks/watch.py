"""Hooks on a denoiser and its text encoders for the time of one pipeline call, and what they tell."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from goca_guidance.denoisers.base import DenoiserCall, Family, argument, check_whole
from goca_guidance.denoisers.words import Encoded, encoder_ids
from goca_guidance.hooks.observer import AttentionObserver
from goca_guidance.hooks.shared import eager_here, hook_here
from goca_guidance.method.records import AttentionRecord


class Watch:
    """Hooks on a denoiser and its text encoders for the time of one pipeline call; a subclass says what to do with them.

    While `installed`, in this order, as the stock pipeline runs:

    1. each text encoder is called, once for the prompt and once more for a negative prompt: its ids are noted (`encoded`),
       until the denoiser is called;
    2. the denoiser is called: the call's sizes are noted in `call`, and `on_forward` may set `observer.projected`,
       `observer.paused`, clear `observer.seen`, and make a `segmentor`;
    3. each of its attention calls, in network order: `on_attention`, unless paused;
    4. 2 and 3 again, for the other prediction or the next step.

    Forwards that are not the pipeline's own (`is_own`), or run inside another one, are passed over. At the end, also after an
    error, hooks and observer are gone, and `forget` lets the records go. After an error the denoiser has the attention
    processors that it had before: stock pipelines that set some of their own would leave them behind.

    Args:
        family: the denoiser's adapter.
        text_encoders: each with its tokenizer, in the order of the denoiser's text sequence; None for an encoder that is not
            loaded.
    """

    def __init__(self, family: Family, text_encoders: Sequence[tuple[Any, Any]]):
        check_whole(family)
        self.family = family
        self.text_encoders = [(module, tokenizer) for module, tokenizer in text_encoders if module is not None]
        self.reads: list[list[Tensor]] = [[] for _ in self.text_encoders]  # ids by encoder, of each time it was called
        self._listening = True  # to the text encoders
        self._outside: list[bool] = []  # by running forward: whether attention was paused before it
        self.segmentor: Any = None  # of the forward in progress, where one is

    def is_own(self) -> bool:
        """Whether the forward that begins is the watched pipeline's own."""
        return True

    def on_forward(self, call: DenoiserCall, device: torch.device) -> None:
        """The denoiser is called."""
        raise NotImplementedError

    def on_attention(self, record: AttentionRecord) -> None:
        """An attention call of it was seen."""
        raise NotImplementedError

    def forget(self) -> None:
        """Let go of what refers to this object: records would wait for the garbage collector, also after an error."""
        del self.observer
        self.segmentor = None

    @contextmanager
    def installed(self):
        """All hooks, gone afterwards, whatever happens. What is compiled runs eagerly in this thread: it would ignore them."""
        preset = self.family.preset
        modules = {name: m for name, m in self.family.attention_modules.items() if name in preset.layers}
        raw = frozenset({preset.reference}) if preset.features == "query" else frozenset()
        self.observer = AttentionObserver(modules, self.on_attention, self._view, self.family.project, raw)
        self.observer.paused = True
        hooked = [(self.family.denoiser, self._before_denoiser)]
        hooked += [(module, self._before_text_encoder(i)) for i, (module, _) in enumerate(self.text_encoders)]
        compiled = [] if self.family.compiled is None else [self.family.compiled]
        with ExitStack() as stack:
            stack.enter_context(eager_here([*compiled, *(module for module, _ in hooked)]))
            for module, hook in hooked:
                stack.callback(hook_here(module.register_forward_pre_hook, hook, with_kwargs=True).remove)
            after = self.family.denoiser.register_forward_hook
            stack.callback(hook_here(after, self._after_denoiser, always_call=True).remove)
            stack.enter_context(self.observer)
            stack.callback(self.forget)
            stack.enter_context(self._processors_kept())
            yield

    @cached_property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(type(self.family.denoiser).forward)

    @cached_property
    def processors(self) -> list[tuple[Any, Any]]:
        """Every attention module of the denoiser with the processor that it had when the call began."""
        found = [module for module in self.family.denoiser.modules() if hasattr(module, "set_processor")]
        return [(module, module.processor) for module in found]

    @contextmanager
    def _processors_kept(self) -> Iterator[None]:
        before = self.processors
        try:
            yield
        except BaseException:
            for module, processor in before:
                if module.processor is not processor:
                    module.set_processor(processor)
            raise

    def encoded(self, turn: int) -> list[Encoded]:
        """What each encoder read the first time (0) or the second time (1); nothing where it did not."""
        found, start = [], 0
        for (_, tokenizer), ids in zip(self.text_encoders, self.reads, strict=True):
            if 0 <= turn < len(ids):
                found.append(Encoded(tokenizer, ids[turn], start))
                start += ids[turn].shape[1]
        return found

    def _before_text_encoder(self, index):
        def note_ids(module, args, kwargs):
            if self._listening:
                self.reads[index].append(encoder_ids(args, kwargs))

        return note_ids

    def _before_denoiser(self, module, args, kwargs):
        self._outside.append(self.observer.paused)
        if len(self._outside) > 1 or not self.is_own():
            self.observer.paused = True
            return
        self._listening = self.observer.paused = False
        sample = argument(args, kwargs, 0, "sample", "hidden_states")
        self.call = self.family.call(args, kwargs)
        self.observer.images = self.call.batch
        given = self._signature.bind_partial(module, *args, **kwargs).arguments
        self.shape, self.timestep, self.text = sample.shape, given.get("timestep"), given.get("encoder_hidden_states")
        self.on_forward(self.call, sample.device)

    def _after_denoiser(self, *_):
        if self._outside:  # else another hook failed before ours began
            self.observer.paused = self._outside.pop()

    def _view(self, name, queries, keys):
        return self.family.view(self.call, name, queries, keys)
