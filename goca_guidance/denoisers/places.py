"""Where the tokens of text encoders stand in a denoiser's text: told by rows that are bit-equal, and by no number.

Pipelines drop templates, cut padding, put texts one behind another, and stack hidden layers. What an encoder gave for a token
is in the denoiser's text all the same, so a few channels of each row tell which token it is of, and of which of the texts.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


CHANNELS = 8  # of each row: 128 bits and more
OFTEN = 32  # a row that a text has more often is padding
Part = Tensor | Sequence[Tensor]  # of the denoiser's text: one [T c] for each image


@dataclass(frozen=True)
class Read:
    """One call of a text encoder: `ids` b n, on the CPU, and the first channels of every hidden layer that it returned.

    `layers`: each b n c, on the encoder's device. `heard`: b n, on the CPU, which tokens are no padding, where it was told.
    """

    ids: Tensor
    layers: tuple[Tensor, ...] = ()
    heard: Tensor | None = None

    def rows(self) -> list[list[int]]:
        """The ids of each text; padding that the encoder was told of is -1."""
        return (self.ids if self.heard is None else self.ids.masked_fill(~self.heard, -1)).tolist()


@dataclass(frozen=True)
class Run:
    """Tokens of one text that stand side by side in the denoiser's text.

    `source`: number of the encoder, of its call, of the row; tokens `first` to `first + length` of it stand from `place` on.
    `part`: number of the part of the denoiser's text: an encoder's text may be in several.
    """

    part: int
    source: tuple[int, int, int]
    first: int
    place: int
    length: int


def read_of(
    args: tuple, kwargs: Mapping, output: Any, change: Callable[[Tensor], Tensor] = lambda layer: layer
) -> Read | None:
    """What a text encoder's forward hook sees; None where it was given no ids. `change`: what becomes of a layer."""
    ids, mask = args[0] if args else kwargs.get("input_ids"), kwargs.get("attention_mask")
    if ids is None:
        return None
    layers = (rows if rows.shape[:2] == ids.shape else rows.transpose(0, 1) for rows in _rows(output, ids.shape))
    heard = mask.bool().cpu() if isinstance(mask, Tensor) and mask.shape == ids.shape else None
    return Read(ids.cpu(), tuple(change(layer)[..., :CHANNELS].detach().clone() for layer in layers), heard)


def _rows(output: Any, shape: torch.Size) -> Iterator[Tensor]:
    """Every tensor [b n c], or [n b c] (ChatGLM), of an output."""
    if isinstance(output, Tensor):
        if output.ndim == 3 and output.is_floating_point() and output.shape[:2] in (shape, shape[::-1]):
            yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _rows(part, shape)


def placed(reads: Sequence[Sequence[Read]], texts: Sequence[Part]) -> list[list[Run]]:
    """For each image, the tokens of its text that stand in the denoiser's.

    Args:
        reads: every call, by encoder.
        texts: the parts of the denoiser's text, in the order of its tokens; each is one [T c] for each image, or
            [T L c] of stacked layers.
    """
    calls = [(encoder, number, read) for encoder, each in enumerate(reads) for number, read in enumerate(each)]
    layers = [(encoder, number, i, layer) for encoder, number, read in calls for i, layer in enumerate(read.layers)]
    parts = [(row if row.ndim == 2 else row[:, 0])[:, :CHANNELS] for text in texts for row in text]
    if not layers or not parts:
        return [[] for _ in texts[0]] if texts else []
    width = min(each.shape[-1] for each in (*parts, *(layer for *_, layer in layers)))
    keys = _keys([*parts, *(layer.to(parts[0]) for *_, layer in layers)], width)
    of_layers: dict[tuple[int, int], list] = {}  # by encoder and layer: call, keys of each row
    for (encoder, number, i, layer), of_layer in zip(layers, keys[len(parts) :], strict=True):
        n = layer.shape[1]
        rows = [of_layer[start : start + n] for start in range(0, len(of_layer), n)]
        of_layers.setdefault((encoder, i), []).append((number, rows))
    images, start = len(texts[0]), 0
    found: list[list[Run]] = [[] for _ in texts[0]]
    for number, text in enumerate(texts):
        wanted = keys[number * images : (number + 1) * images]
        table = _table(of_layers, set().union(*wanted) - {b""})
        for runs, row in zip(found, wanted, strict=True):
            runs += _runs(number, row, table, start)
        start += max(len(row) for row in text)
    return found


def _keys(rows: Sequence[Tensor], width: int) -> list[list[bytes]]:
    """The rows [.. c] as bytes, brought to the CPU at once; zeros, which stand for padding, are no row's."""
    kept = [each[..., :width].reshape(-1, width) + 0 for each in rows]  # -0 is 0
    data = torch.cat(kept).contiguous().view(torch.uint8).cpu().numpy().tobytes()
    size = width * kept[0].element_size()
    keys = iter([data[i : i + size].strip(b"\0") and data[i : i + size] for i in range(0, len(data), size)])
    return [[next(keys) for _ in range(len(each))] for each in kept]


def _table(of_layers, wanted: set[bytes]) -> dict[bytes, list[tuple[tuple[int, int, int], int]]]:
    """Where each key stands: source and token. Of each encoder, in the layer that has most of what is wanted."""
    scores = {
        layer: sum(key in wanted for _, rows in calls for row in rows for key in row)
        for layer, calls in of_layers.items()
    }
    table: dict[bytes, list] = {}
    for encoder in {encoder for encoder, _ in of_layers}:
        best = max((layer for layer in scores if layer[0] == encoder), key=lambda layer: (scores[layer], layer))
        for call, rows in of_layers[best]:
            for number, row in enumerate(rows):
                often = Counter(row)
                for token, key in enumerate(row):
                    if key in wanted and often[key] <= OFTEN:
                        table.setdefault(key, []).append(((encoder, call, number), token))
    return table


def _runs(part: int, row: list[bytes], table, start: int) -> Iterator[Run]:
    """The longest runs, from left to right; of two as long, that of the text with more of the row."""
    votes = Counter(source for key in row for source, _ in table.get(key, ()))
    lengths: list[dict] = [{} for _ in range(len(row) + 1)]  # by source and token, of the run that begins there
    for at in reversed(range(len(row))):
        behind = lengths[at + 1]
        lengths[at] = {
            (source, token): 1 + behind.get((source, token + 1), 0) for source, token in table.get(row[at], ())
        }
    at = 0
    while at < len(row):
        sites = lengths[at]
        if sites:
            source, token = max(sites, key=lambda site: (sites[site], votes[site[0]]))
            yield Run(part, source, token, start + at, sites[source, token])
        at += max(sites.values(), default=1)
