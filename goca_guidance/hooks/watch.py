"""Hooks on a denoiser and its text encoders for the time of one pipeline call, and what they tell."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from goca_guidance.denoisers.base import DenoiserCall, Family, check_whole
from goca_guidance.denoisers.places import Read, read_of
from goca_guidance.denoisers.readings import told_by_rows
from goca_guidance.denoisers.unknown import UnknownFamily
from goca_guidance.denoisers.words import Encoded, bare, has_marks
from goca_guidance.hooks.compiled import guided_here
from goca_guidance.hooks.observer import AttentionObserver
from goca_guidance.hooks.probe import probe
from goca_guidance.hooks.shared import eager_here, hook_here
from goca_guidance.method.records import AttentionRecord


TIMESTEPS = ("timestep", "timesteps", "t")  # what a denoiser calls it


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

    A pipeline may have several denoisers, one for some of the steps each: `family` and `observer` are those of the one that
    is called, the first one before.

    Args:
        families: the denoisers' adapters.
        text_encoders: each with its tokenizer, in the order of the denoiser's text sequence; None for an encoder that is not
            loaded.
    """

    def __init__(self, families: Sequence[Family], text_encoders: Sequence[tuple[Any, Any]]):
        for family in families:
            check_whole(family)
        self.families, self.family = families, families[0]
        self.text_encoders = [(module, tokenizer) for module, tokenizer in text_encoders if module is not None]
        self.reads: list[list[Read]] = [[] for _ in self.text_encoders]  # by encoder, of each time it was called
        self._given: dict[str, Any] = {}  # arguments of the forward in progress, by name
        self._listening = True  # to the text encoders
        self._outside: list[tuple[AttentionObserver, bool]] = []  # by running forward: who was paused before it
        self.segmentor: Any = None  # of the forward in progress, where one is

    def is_own(self) -> bool:
        """Whether the forward that begins is the watched pipeline's own."""
        return True

    @property
    def frames(self) -> int:
        """Of a video whose layers read each of them as an image."""
        return self.call.latent[0] if self.family.by_frame else 1

    def on_forward(self, call: DenoiserCall, device: torch.device) -> None:
        """The denoiser is called."""
        raise NotImplementedError

    def on_attention(self, record: AttentionRecord) -> None:
        """An attention call of it was seen."""
        raise NotImplementedError

    def hand(self, sample: Tensor) -> Tensor | None:
        """What is to take the place of what the denoiser is called with, or None."""

    def on_prediction(self, output: Any) -> Any:
        """The denoiser has predicted: what replaces its output, or None."""

    def forget(self) -> None:
        """Let go of what refers to this object: records would wait for the garbage collector, also after an error."""
        del self.observer, self._observers
        self.segmentor, self._given = None, {}

    @contextmanager
    def installed(self):
        """All hooks, gone afterwards, whatever happens. Graphs would ignore them: compiled text encoders run eagerly."""
        self._observers = [self._observer(family) for family in self.families]
        self.observer = self._observers[0]
        hooked = [(family.denoiser, self._before_denoiser(i)) for i, family in enumerate(self.families)]
        with ExitStack() as stack:
            stack.enter_context(eager_here(module for module, _ in self.text_encoders))
            for family, observer in zip(self.families, self._observers, strict=True):
                stack.enter_context(guided_here(family, observer))
            for module, hook in hooked:
                stack.callback(hook_here(module.register_forward_pre_hook, hook, with_kwargs=True).remove)
            for i, (module, _) in enumerate(self.text_encoders):
                stack.callback(
                    hook_here(module.register_forward_hook, self._after_text_encoder(i), with_kwargs=True).remove
                )
            for family in self.families:
                after = family.denoiser.register_forward_hook
                stack.callback(hook_here(after, self._after_denoiser, always_call=True).remove)
            for observer in self._observers:
                stack.enter_context(observer)
            stack.callback(self.forget)
            stack.enter_context(self._processors_kept())
            yield

    def _observer(self, family: Family) -> AttentionObserver:
        preset = family.preset
        modules = {name: m for name, m in family.attention_modules.items() if name in preset.layers}
        raw = frozenset({preset.reference}) if preset.features == "query" else frozenset()
        observer = AttentionObserver(modules, self.on_attention, self._view, family.project, raw, family.segmented)
        observer.paused = True
        return observer

    @cached_property
    def processors(self) -> list[tuple[Any, Any]]:
        """Every attention module of the denoisers with the processor that it had when the call began."""
        modules = [module for family in self.families for module in family.denoiser.modules()]
        return [(module, module.processor) for module in modules if hasattr(module, "set_processor")]

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

    @property
    def texts(self) -> Sequence[Any]:
        """The parts of the text of the forward in progress, in the order of the tokens; each is one [T c] an image."""
        return self.family.text(self._given)

    @property
    def tokenizers(self) -> list[Any]:
        return [bare(tokenizer) for _, tokenizer in self.text_encoders]

    def encoded(self, prompts: Sequence[str] | None = None) -> list[Encoded]:
        """What each encoder read first, with the places of its tokens in the text of the forward in progress.

        `prompts`: one for each image; needed where a tokenizer does not show where words begin, or a template is read.
        """
        if not all(map(has_marks, self.tokenizers)):
            found = told_by_rows(self.reads, self.tokenizers, self.texts, None if prompts is None else [list(prompts)])
            if found is not None:
                return found
        found, start = [], 0
        for tokenizer, reads in zip(self.tokenizers, self.reads, strict=True):
            if reads:
                each = None if prompts is None else [[prompt] for prompt in prompts]
                ids = reads[0].ids
                if each and len(ids) < len(each) and sum(len(read.ids) for read in reads) == len(each):
                    ids = pad_sequence(
                        [row for read in reads for row in read.ids], batch_first=True
                    )  # one by one (Bria)
                found.append(Encoded(tokenizer, ids, start, prompts=each))
                start += ids.shape[1]
        return found

    def _after_text_encoder(self, index):
        def note(module, args, kwargs, output):
            read = read_of(args, kwargs, output, self.family.read) if self._listening else None
            if read is not None:
                self.reads[index].append(read)

        return note

    def _before_denoiser(self, index):
        def before(module, args, kwargs):
            observer = self._observers[index]
            self._outside.append((observer, observer.paused))
            if len(self._outside) > 1 or not self.is_own():
                observer.paused = True
                return
            self.family, self.observer = self.families[index], observer
            if isinstance(self.family, UnknownFamily) and not self.family.layouts:
                probe(self.family, args, kwargs)
            self._listening = observer.paused = False
            given = self._given = self.family.bound(args, kwargs)
            sample, self.call = self.family.sample(given), self.family.sizes(given)
            observer.images = self.call.batch * self.frames
            self.timestep = next((given[name] for name in TIMESTEPS if name in given), None)
            self.text = given.get(self.family.texts[0])
            self.on_forward(self.call, sample.device)
            handed = self.hand(sample)
            return None if handed is None else self.family.hand(args, kwargs, handed)

        return before

    def _after_denoiser(self, module, args, output):
        """Returns what replaces the output, or None."""
        if not self._outside:  # another hook failed before ours began
            return None
        observer, paused = self._outside.pop()
        observer.paused = paused
        return None if self._outside or output is None or not self.is_own() else self.on_prediction(output)

    def _view(self, name, queries, keys):
        return self.family.view(self.call, name, queries, keys)
