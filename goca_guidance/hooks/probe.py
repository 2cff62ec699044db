"""Where text stands in a denoiser's attention: one token of its text is changed, and the keys that move are looked at."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from goca_guidance.denoisers.base import DenoiserCall
from goca_guidance.denoisers.unknown import Layout, UnknownFamily
from goca_guidance.hooks.observer import AttentionObserver
from goca_guidance.method.records import AttentionRecord, AttentionView


def probe(family: UnknownFamily, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Let a family learn its layout from two forwards more: as called, and with the last text token changed.

    In the first joint layer exactly that token's key moves, or, where the text was mixed before, all of the text's; from then
    on everything does. The pixels stand before the text, or behind it.
    """
    given = family.bound(args, kwargs)
    given.pop("self", None)
    call = family.sizes(given)
    text = family.text(given)[0]
    changed = text.clone()
    changed[:, -1] += 1
    name = family.texts[0]
    before = _keys(family, call, {**given, name: text})
    after = _keys(family, call, {**given, name: changed})
    first = next((n for n in before if 0 < len(_moved(before[n], after[n])) < before[n].shape[1]), None)
    if first is None:
        family.learn({})
        return
    last, length = int(_moved(before[first], after[first])[-1]), before[first].shape[1]
    start, pixels = last - call.text + 1, math.prod(family.grid(first, call.latent))
    behind = last + 1 + pixels == length
    layout = Layout(start, last + 1 if behind else start - pixels)
    whole = behind or last + 1 == length
    joint = [n for n, keys in before.items() if keys.shape[1] == length]
    family.learn(dict.fromkeys(joint, layout) if whole and min(layout.text, layout.pixels) >= 0 else {})


def _moved(before: Tensor, after: Tensor) -> Tensor:
    return (before - after).abs().amax((0, 2)).nonzero().flatten()


def _keys(family: UnknownFamily, call: DenoiserCall, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Keys h n d of the first image in each layer's attention, in the order in which they ran."""
    found: dict[str, Tensor] = {}

    def keep(record: AttentionRecord) -> None:
        found[record.name] = record.key[0].float()

    def view(name: str, queries: int, keys: int) -> AttentionView:
        return AttentionView((1, queries), text=slice(0, keys))

    observer = AttentionObserver(family.attention_modules, keep, view, family.project)
    observer.images = call.batch
    with observer, torch.no_grad():
        family.denoiser.forward(**given)
    return found
