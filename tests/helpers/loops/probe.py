"""Where the tokens of a denoiser's text and pixels stand among the keys of its layers: found by trying, not by reading facts.

One token of the text, or one pixel, is changed in a call of the denoiser that hands on nothing from token to token: every
attention answers zeros. So exactly the keys of that token move, in every layer.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.helpers.loops.kernels import Kernels, bound, copied


Tokens = list[list[Tensor]]  # of the conditional prediction's last image: of each token all that a denoiser is given


# ---- what a denoiser is given ----------------------------------------------------------------------------------------
def _tokens(*given: Tensor) -> Tokens:
    """Of tensors whose row i is token i."""
    return [list(rows) for rows in zip(*(tensor.unbind(0) for tensor in given), strict=True)]


def _zimage(given: Mapping) -> Tokens:
    parts = given["cap_feats"][0]  # several beside pictures
    return [token for part in (parts if isinstance(parts, list) else [parts]) for token in _tokens(part)]


TEXTS: dict[str, Callable[[Mapping], Tokens]] = {  # by denoiser, where not the last image of `encoder_hidden_states`
    "BriaFiboTransformer2DModel": lambda given: _tokens(
        given["encoder_hidden_states"][-1], *(layer[-1] for layer in given["text_encoder_layers"])
    ),
    "BriaFibo2Transformer2DModel": lambda given: _tokens(given["encoder_hidden_states"][-1].transpose(0, 1)),
    "ErnieImageTransformer2DModel": lambda given: _tokens(given["text_bth"][-1]),
    "ZImageTransformer2DModel": _zimage,
}
PIXELS: dict[str, Callable[[Mapping], Tensor]] = {  # n c, or c *S
    "QwenImage21Transformer2DModel": lambda given: given["hidden_states"][
        -1, -math.prod(given["img_shapes"][0][-1]) :
    ],
    "ZImageTransformer2DModel": lambda given: given["x"][0][-1] if isinstance(given["x"][0], list) else given["x"][0],
}


def texts(denoiser: torch.nn.Module, given: Mapping) -> Tokens:
    kind = type(denoiser).__name__
    return TEXTS[kind](given) if kind in TEXTS else _tokens(given["encoder_hidden_states"][-1])


def pixels(denoiser: torch.nn.Module, given: Mapping) -> Tensor:
    name = "hidden_states" if "hidden_states" in given else "sample"
    return PIXELS.get(type(denoiser).__name__, lambda given: given[name][-1])(given)


# ---- what moves ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sizes:
    """Of one layer's attention call: so many queries and keys."""

    queries: int
    keys: int


class Probe:
    """A call of a denoiser tried out: which queries and keys of its layers belong to which token.

    Of a layer that calls its kernel more than once, the last call counts whose keys the text moves, else the first. `tokens`
    of packed latents are the image's own; others stand behind them.
    """

    def __init__(self, denoiser: torch.nn.Module, names: Sequence[str], call: tuple[tuple, dict], tokens: int | None):
        self.kernels, self.call, self.names = Kernels(denoiser, names, silent=True), call, names
        self.before = self.kernels(call)
        everything = self._after(lambda given: [_shake(*token) for token in texts(denoiser, given)])
        self.which = {name: self._text_call(everything[name], name) for name in names}
        self.text = {name: self._moved(everything, name, "key") for name in names}
        everything = self._after(lambda given: _shake(pixels(denoiser, given)[:tokens]))
        self.pixels = {name: self._moved(everything, name, "key") for name in names}
        self.rows = {name: self._moved(everything, name, "query") for name in names}

    def sizes(self, name: str) -> Sizes:
        asked = self.before[name][self.which[name]]
        return Sizes(asked["query"].shape[2], asked["key"].shape[2])

    def of_token(self, token: int) -> dict[str, list[int]]:
        """Keys of each layer that move with a token of the text, the one that moves most first."""
        after = self._after(lambda given: _shake(*texts(self.kernels.denoiser, given)[token]))
        return {name: self._moved(after, name, "key") for name in self.names}

    def of_pixel(self, pixel: int, count: int) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """Queries and keys of each layer that move with a pixel token, one of so many, row-major."""

        def change(given):
            tokens = pixels(self.kernels.denoiser, given)
            if tokens.ndim > 2:  # c *S
                side = math.isqrt(tokens[0].numel() // count)
                height, width = (length // side for length in tokens.shape[-2:])
                frame, place = divmod(pixel, height * width)
                row, column = (side * index for index in divmod(place, width))
                of_frame = tokens if tokens.ndim == 3 else tokens[:, frame]
                tokens = of_frame[:, row : row + side, column : column + side]
            else:
                tokens = tokens[pixel]
            _shake(tokens)

        after = self._after(change)
        return tuple({name: self._moved(after, name, which) for name in self.names} for which in ("query", "key"))

    def _after(self, change: Callable[[dict], Any]) -> dict[str, list[dict]]:
        call = copied(self.call)
        change(bound(self.kernels.denoiser, call))
        return self.kernels(call)

    def _text_call(self, after, name) -> int:
        moved = [i for i, asked in enumerate(after) if _distance(asked, self.before[name][i], "key").any()]
        return moved[-1] if moved else 0

    def _moved(self, after, name, what) -> list[int]:
        change = _distance(after[name][self.which[name]], self.before[name][self.which[name]], what)
        return [i for i in change.argsort(descending=True).tolist() if change[i] > 0]


def _shake(*tensors: Tensor) -> None:
    """Add noise, the same at every call, to each."""
    for tensor in tensors:
        tensor += torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))


def _distance(after: dict, before: dict, what: str) -> Tensor:
    """How far each token's key or query, in any image and head, has moved."""
    return (after[what] - before[what]).float().abs().amax((0, 1, 3))
