"""GoCA and S-CFG as their papers and released code define them: float64, every map built and kept, one image at a time.

Written from GoCA (arXiv 2603.06178), S-CFG (arXiv 2404.05384) and what their releases compute, not from the library: nothing
of its method or of its hooks is used. A denoiser's call is repeated, and what torch's attention function is given is noted:
only that is float32. Which layers are read, and where the tokens stand, is for the caller to say. Maps are on the finest grid
read, where the releases' are always 64 x 64.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from goca_guidance.config import LayerPreset


# ---- what a denoiser attends to --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Layer:
    """Attention of one layer for one image. `words` h p n and `pixels` h p q: the text and pixel keys' columns of one softmax
    map; `writes` h p c: what each head adds to the layer's output; `features` p c: dense features, by kind.
    """

    grid: tuple[int, int]
    words: Tensor
    pixels: Tensor
    writes: Tensor
    features: dict[str, Tensor]


@contextmanager
def calls(denoiser: torch.nn.Module) -> Iterator[list[tuple[tuple, dict]]]:
    """The arguments of every call of a denoiser inside the block."""
    seen: list[tuple[tuple, dict]] = []

    def note(module, args, kwargs):
        seen.append(tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs)))

    handle = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


class Replay(TorchFunctionMode):
    """A copy of a denoiser, which repeats calls and notes what torch's attention function is given in each layer."""

    def __init__(self, denoiser: torch.nn.Module, names: Sequence[str]):
        super().__init__()
        self.denoiser, self.names = copy.deepcopy(denoiser), names
        self._asked: dict[str, dict] = {}
        self._running: str | None = None
        for name in names:
            module = self.denoiser.get_submodule(name)
            module.register_forward_pre_hook(lambda *_, name=name: setattr(self, "_running", name))
            module.register_forward_hook(lambda *_: setattr(self, "_running", None))
            module.to_q.register_forward_hook(lambda _, args, output, name=name: self._note(name, raw=output))

    def _note(self, name, **what):
        self._asked.setdefault(name, {}).update(what)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and self._running is not None:
            given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            self._note(self._running, **given)
        return function(*args, **kwargs)

    @torch.no_grad()
    def layers(self, call: tuple[tuple, dict], size: tuple[int, int]) -> list[dict[str, Layer]]:
        """Of each image of a call's batch. `size`: height and width of the pictures, in any unit."""
        args, kwargs = call
        with self:
            self.denoiser(*args, **kwargs)
        text = (kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]).shape[1]
        if "encoder_hidden_states_t5" in kwargs:
            text += kwargs["encoder_hidden_states_t5"].shape[1]
        batch = len(self._asked[self.names[0]]["query"])
        return [
            {name: _layer(self.denoiser, name, self._asked[name], image, text, size) for name in self.names}
            for image in range(batch)
        ]


def _layer(denoiser, name, asked, image, text, size) -> Layer:
    q, k, v = (asked[which][image].double() for which in ("query", "key", "value"))
    logits = q @ k.mT * (asked.get("scale") or q.shape[-1] ** -0.5)
    if (mask := asked.get("attn_mask")) is not None:
        assert mask.is_floating_point()  # else it would not be added
        logits = logits + mask[image % len(mask)].double()
    probs = logits.softmax(-1)
    words, pixels = _keys(denoiser, name, text, probs.shape[-1])
    queries = pixels if words.stop and pixels.stop else slice(None)  # joint attention: the pixels' alone
    probs, written = probs[:, queries], (probs @ v)[:, queries]
    heads = _projection(denoiser, name).unflatten(1, (len(q), -1)).permute(1, 2, 0)  # h d c
    features = {"query": asked["raw"][image].double(), "output": written.transpose(0, 1).flatten(1)}
    rows = round(math.sqrt(probs.shape[1] * size[0] / size[1]))
    grid = rows, probs.shape[1] // rows
    return Layer(grid, probs[..., words], probs[..., pixels], written @ heads, features)


def _keys(denoiser, name, text, count) -> tuple[slice, slice]:
    """Which keys are words and which are pixels: Flux has the words first, Stable Diffusion 3 the pixels."""
    kind = type(denoiser).__name__
    if kind.startswith("Flux"):
        return slice(0, text), slice(text, count)
    if kind.startswith("SD3"):
        return slice(count - text, count), slice(0, count - text)
    return (slice(0, count), slice(0, 0)) if name.endswith("attn2") else (slice(0, 0), slice(0, count))


def _projection(denoiser, name) -> Tensor:
    """c x (h d); a single block of Flux projects attention and feed-forward at once."""
    module = denoiser.get_submodule(name)
    if getattr(module, "to_out", None) is not None:
        return module.to_out[0].weight.double()
    weight = denoiser.get_submodule(name.removesuffix(".attn")).proj_out.weight
    return weight[:, : module.to_q.out_features].double()


# ---- maps ------------------------------------------------------------------------------------------------------------
def bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


def nearest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps[None], size, mode="nearest")[0]


def min_max(maps: Tensor) -> Tensor:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low)


def gaussian(maps: Tensor, reach: int, sigma: float) -> Tensor:
    """Reflected borders, as one 2-D kernel."""
    axis = torch.arange(-reach, reach + 1, dtype=maps.dtype)
    taps = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * sigma**2))
    padded = F.pad(maps[:, None], (reach,) * 4, mode="reflect")
    return F.conv2d(padded, (taps / taps.sum())[None, None])[:, 0]


def blur(maps: Tensor) -> Tensor:
    """5 x 5, sigma 1.1 on a 64 x 64 map; on another grid (ours) the window shrinks with the map."""
    relative = math.sqrt(maps[0].numel()) / 64
    return gaussian(maps, math.ceil(2 * relative), 1.1 * relative)


def on_grid(affinity: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """A p x q self-attention map on another grid: keys bilinear, queries nearest, rows left as they are."""
    keys = bilinear(affinity.unflatten(1, grid), target).flatten(1)
    return nearest(keys.mT.unflatten(1, grid), target).flatten(1).mT


# ---- GoCA ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class GoCA:
    """One step: the conditional prediction's layers and, where the model has them, the unconditional one's.

    `heads`: "contribution" or "uniform". `channels`: of the dense features, None for all. `row_normalise`: a switch of ours.
    `plain`: the baseline of GoCA's tables, with layers averaged and no rescaling.
    """

    preset: LayerPreset
    positive: dict[str, Layer]
    negative: dict[str, Layer] = field(default_factory=dict)
    heads: str = "contribution"
    channels: int | None = None
    row_normalise: bool = False
    plain: bool = False

    def layer_weights(self, layers: dict[str, Layer]) -> Tensor:
        """<softmax(F F^T / sqrt(c)), A_self>, not below zero, over the sum of all layers (GoCA, layers)."""
        if self.plain or not self.preset.self_attention:
            return torch.full([len(self.preset.text)], 1 / len(self.preset.text))
        reference, found = layers[self.preset.reference], []
        features = reference.features[self.preset.features][:, : self.channels]
        pseudo = (features @ features.mT / math.sqrt(features.shape[1])).softmax(-1)
        for name in self.preset.self_attention:
            resized = on_grid(layers[name].pixels.mean(0), layers[name].grid, reference.grid)
            resized = resized / resized.sum(1, keepdim=True) if self.row_normalise else resized
            found.append((pseudo * resized).sum().clamp(min=0))
        return torch.stack(found) / sum(found)

    def layer_map(self, layer: Layer) -> Tensor:
        """p n: heads by <o_h, o> over its sum, at every pixel (GoCA, heads)."""
        if self.heads == "uniform":
            return layer.words.mean(0)
        share = (layer.writes * layer.writes.sum(0)).sum(-1)
        return (layer.words * (share / share.sum(0))[..., None]).sum(0)

    def aggregated(self, layers: dict[str, Layer]) -> Tensor:
        """n H W of one prediction, all tokens of which sum to one at a pixel."""
        total = 0
        for name, weight in zip(self.preset.text, self.layer_weights(layers), strict=True):
            total = total + weight * bilinear(
                self.layer_map(layers[name]).mT.unflatten(1, layers[name].grid), self.grid
            )
        total = total.clamp(min=0)
        return total / total.sum(0)

    @property
    def grid(self) -> tuple[int, int]:
        """On which maps are merged: the finest one read (ours; the releases' is always 64 x 64)."""
        return max((self.positive[name].grid for name in (*self.preset.text, *self.preset.refine)), key=math.prod)

    def refined(self, maps: Tensor) -> Tensor:
        return min_max(self.spread(maps))

    def spread(self, maps: Tensor) -> Tensor:
        """x <- A_self x, with the conditional prediction's fine layers; min-max follows (GoCA, refinement)."""
        layers = [self.positive[name] for name in self.preset.refine]
        if not layers:  # linear self-attention has no map (ours)
            return maps
        affinity = sum(on_grid(layer.pixels.mean(0), layer.grid, self.grid) for layer in layers) / len(layers)
        x = maps.flatten(1).mT
        for _ in range(self.preset.order):
            x = affinity @ x
        return x.mT.unflatten(1, self.grid)

    def rescaled(self, words: Sequence[Sequence[int]], content: Sequence[int]) -> Tensor:
        """k H W: a word's tokens averaged, over the pixel's sum of content tokens, blurred, min-max (GoCA, rescaling).

        The quotient of a single word would be constant: it stays as it is (ours).
        """
        tokens = self.aggregated(self.positive)
        maps = torch.stack([tokens[list(positions)].mean(0) for positions in words])
        divided = not self.plain and [list(positions) for positions in words] != [list(content)]
        return min_max(blur(maps / tokens[list(content)].sum(0) if divided else maps))

    def scores(self, words: Sequence[Sequence[int]], content: Sequence[int]) -> Tensor:
        """k H W of the words."""
        return self.refined(self.rescaled(words, content))

    def supporting(self, entities: Sequence[Sequence[int]], content: Sequence[int]) -> Tensor:
        """1 H W of what is background in a real image: the highest of the entities' maps, and only then refined."""
        return self.refined(self.rescaled(entities, content).amax(0, keepdim=True))

    def background(self, sink: int) -> Tensor:
        """1 H W, the foreground is below one half: the sink token's share of all tokens, refined, then blurred.

        Of the unconditional prediction where one is given, refined by the conditional one's pixels all the same.
        """
        return min_max(blur(self.refined(self.sink_share(sink))))

    def sink_share(self, sink: int) -> Tensor:
        """1 H W, of all tokens."""
        return self.aggregated(self.negative or self.positive)[sink : sink + 1]


# ---- S-CFG -----------------------------------------------------------------------------------------------------------
def scfg_layers(preset: LayerPreset, layers: dict[str, Layer]) -> list[Tensor]:
    """n H W of each layer on the two coarsest grids: heads averaged, (S + 3 S^2) / 4, bilinear to the finer one, smoothed.

    The smoothing's sigma is called 0.5 in the release, which divides by twice its square root: 0.7071.
    """
    grids = sorted({layers[name].grid for name in preset.text}, key=math.prod)[:2]
    maps = []
    for name, beside in zip(preset.text, preset.self_attention, strict=True):
        grid, words, pixels = layers[name].grid, layers[name].words.mean(0), layers[beside].pixels.mean(0)
        if grid in grids:
            refined = (pixels + 3 * pixels @ pixels) / 4 @ words
            maps.append(gaussian(bilinear(refined.mT.unflatten(1, grid), grids[-1]), 1, math.sqrt(0.5)))
    return maps


def over_spatial_mean(maps: Sequence[Tensor]) -> Tensor:
    """Each layer's maps over their mean over pixels, averaged over layers."""
    return sum(m / (m.mean((1, 2), keepdim=True) + 1e-8) for m in maps) / len(maps)


def scfg_scores(preset: LayerPreset, layers: dict[str, Layer]) -> Tensor:
    """n H W of every token, special ones and padding included, in the conditional prediction."""
    return over_spatial_mean(scfg_layers(preset, layers))


def scfg_background(preset: LayerPreset, layers: dict[str, Layer], sink: int) -> Tensor:
    """1 H W, the foreground is below zero: the sink token less the sum of all others, each over its mean over pixels."""
    both = [torch.stack([m[sink], m.sum(0) - m[sink]]) for m in scfg_layers(preset, layers)]
    start, others = over_spatial_mean(both)
    return (start - others)[None]


# ---- comparisons -----------------------------------------------------------------------------------------------------
TIE = 2e-5  # of scores in [0, 1], which float32 does not tell apart


def assert_argmax(masks: Tensor, scores: Tensor) -> None:
    """Padding is empty; the others are where their score is highest, but for ties."""
    assert not masks[len(scores) :].any()
    scores = nearest(scores, masks.shape[1:])
    behind = scores.amax(0) - (scores * masks[: len(scores)]).sum(0)
    assert (behind > TIE).sum() == 0
    assert (behind > 0).float().mean() < 0.01
    assert masks.flatten(1).any(1).sum() > 1


def assert_foreground(foreground: Tensor, background: Tensor, threshold: float = 0.5) -> None:
    background = nearest(background, foreground.shape[1:])
    wrong = foreground != (background < threshold)
    assert ((background - threshold)[wrong].abs() > TIE).sum() == 0
    assert wrong.float().mean() < 0.01
    assert 0 < foreground.sum() < foreground.numel()
