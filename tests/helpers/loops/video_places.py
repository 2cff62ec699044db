"""Where text and pixels stand among the keys of a video denoiser's attention, said by hand, and what its kernels are given.

Nothing of the library's rows is used: they are held against this.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from goca_guidance.method.records import AttentionRecord, AttentionView


Places = tuple[list[int], list[int]]  # of text and of pixels, in their order


# ---- by hand ---------------------------------------------------------------------------------------------------------
def _run(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


def _cross(given: dict, image: int, keys: int, pixels: int, layer: str) -> Places:
    """What stands before the pixels is of the past (Helios)."""
    reads_text = layer.endswith(("attn2", "cross_attention"))
    return (_run(0, keys), []) if reads_text else ([], _run(keys - pixels, pixels))


def _text_first(given: dict, image: int, keys: int, pixels: int, layer: str) -> Places:
    return _run(0, keys - pixels), _run(keys - pixels, pixels)


def _pixels_first(given: dict, image: int, keys: int, pixels: int, layer: str) -> Places:
    return _run(pixels, keys - pixels), _run(0, pixels)


def _mochi(given: dict, image: int, keys: int, pixels: int, layer: str) -> Places:
    """The valid text alone."""
    return _run(pixels, int(given["encoder_attention_mask"][image].sum())), _run(0, pixels)


def _framepack(given: dict, image: int, keys: int, pixels: int, layer: str) -> Places:
    """Before the text, which is cut where it ends, 16 tokens of a picture; before the pixels, the past."""
    text = int(given["encoder_attention_mask"].sum())
    return _run(keys - text, text), _run(keys - text - 16 - pixels, pixels)


PLACES: dict[str, Callable[[dict, int, int, int, str], Places]] = {
    "CogVideoXTransformer3DModel": _text_first,
    "EasyAnimateTransformer3DModel": _text_first,
    "HunyuanVideoTransformer3DModel": _pixels_first,
    "HunyuanVideo15Transformer3DModel": _pixels_first,
    "HunyuanVideoFramepackTransformer3DModel": _framepack,
    "MochiTransformer3DModel": _mochi,
}


def places_of(denoiser: torch.nn.Module) -> Callable[[dict, int, int, int, str], Places]:
    return PLACES.get(type(denoiser).__name__, _cross)


# ---- looking ---------------------------------------------------------------------------------------------------------
def of_text(denoiser: torch.nn.Module, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kernel calls but those of a picture's tokens, which are fewer than the text's (Wan). Mochi's are one an image."""
    if type(denoiser).__name__ == "MochiTransformer3DModel":
        return calls
    most = max(given["key"].shape[2] for given in calls)
    return [given for given in calls if given["key"].shape[2] == most]


def images_of(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One kernel call of each image; Mochi's are so."""
    if len(calls) > 1:
        return calls
    (given,) = calls
    tensors = ("query", "key", "value", "output")
    each = [{name: given[name][i : i + 1] for name in tensors} for i in range(len(given["query"]))]
    mask = given.get("attn_mask")
    return [
        part | {"attn_mask": None if mask is None else mask[i % len(mask)][None], "scale": given.get("scale")}
        for i, part in enumerate(each)
    ]


def record(name: str, given: dict[str, Any], raw: Tensor | None, places: Places, grid: tuple[int, ...]):
    """What a kernel was given of one image, as a record, its keys those of the text and then those of the pixels.

    Other keys are left out of it: they must be silent.
    """
    text, pixels = places
    kept, query = [*text, *pixels], given["query"]
    rows = pixels if query.shape[2] == given["key"].shape[2] and pixels else _run(0, query.shape[2])
    key, mask = given["key"], given.get("attn_mask")
    if mask is not None:
        mask = mask if mask.is_floating_point() else torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
        mask = mask[..., rows, :] if mask.shape[-2] > 1 else mask
    others = [i for i in range(key.shape[2]) if i not in kept]
    order = [*kept, *others]
    view = AttentionView(grid, slice(0, len(text)), slice(len(text), len(kept)) if pixels else slice(0, 0))
    return AttentionRecord(
        name=name,
        query=query[:, :, rows].double(),
        key=key[:, :, order].double(),
        value=given["value"][:, :, order].double(),
        output=given["output"][:, :, rows].double(),
        scale=given.get("scale") or query.shape[-1] ** -0.5,
        view=view,
        mask=None if mask is None else mask[..., order].double(),
        features=None if raw is None else raw.unflatten(-1, (query.shape[1], -1)).transpose(1, 2)[:, :, rows].double(),
    )
