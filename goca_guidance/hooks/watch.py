"""Hooks on a denoiser and its text encoders for the time of one pipeline call, and what they tell."""

from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
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

    1. each text encoder is called, once for the prompt and once more for a negative prompt: its ids are noted (`encoded`);
    2. the denoiser is called: the call's sizes are noted in `call`, and `on_forward` may set `observer.projected`,
       `observer.paused`, clear `observer.seen`, and make a `segmentor`;
    3. each of its attention calls, in network order: `on_attention`, unless paused;
    4. 2 and 3 again, for the other prediction or the next step.

    At the end, also after an error, hooks and observer are gone, and `forget` lets the records go.

    Args:
        family: the denoiser's adapter.
        text_encoders: each with its tokenizer, in the order of the denoiser's text sequence; None for an encoder that is not
            loaded.
    """

    def __init__(self, family: Family, text_encoders: Sequence[tuple[Any, Any]]):
        check_whole(family)
        self.family = family
        self.text_encoders = [(module, tokenizer) for module, tokenizer in text_encoders if module is not None]
        self._ids: list[list[Tensor]] = [[] for _ in self.text_encoders]  # by encoder, of each time it was called
        self.segmentor: Any = None  # of the forward in progress, where one is

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
        hooked = [(self.family.denoiser, self._before_denoiser)]
        hooked += [(module, self._before_text_encoder(i)) for i, (module, _) in enumerate(self.text_encoders)]
        compiled = [] if self.family.compiled is None else [self.family.compiled]
        with ExitStack() as stack:
            stack.enter_context(eager_here([*compiled, *(module for module, _ in hooked)]))
            for module, hook in hooked:
                stack.callback(hook_here(module.register_forward_pre_hook, hook, with_kwargs=True).remove)
            stack.enter_context(self.observer)
            stack.callback(self.forget)
            yield

    def encoded(self, turn: int) -> list[Encoded]:
        """What each encoder read the first time (0) or the second time (1); nothing where it did not."""
        found, start = [], 0
        for (_, tokenizer), ids in zip(self.text_encoders, self._ids, strict=True):
            if 0 <= turn < len(ids):
                found.append(Encoded(tokenizer, ids[turn], start))
                start += ids[turn].shape[1]
        return found

    def _before_text_encoder(self, index):
        def note_ids(module, args, kwargs):
            self._ids[index].append(encoder_ids(args, kwargs))

        return note_ids

    def _before_denoiser(self, module, args, kwargs):
        sample = argument(args, kwargs, 0, "sample", "hidden_states")
        self.call = self.family.call(args, kwargs)
        self.observer.images = self.call.batch
        self.on_forward(self.call, sample.device)

    def _view(self, name, queries, keys):
        return self.family.view(self.call, name, queries, keys)
