"""Operations, exponentials and bytes that GoCA-S-CFG must add to a step at the least, counted from shapes.

One step is both predictions of one image. The stock step is counted on "meta" tensors. What is added is counted layer by
layer from the sizes of the attention calls, each product and each probability once:

- heads: z M for each text layer (M = W W^T is built once a call), where the preset weights heads;
- cross: the probabilities of the text layers' words; in joint attention they are among the agreement's, and count there;
- reference: the affinity of the reference layer;
- agreement: the probabilities of the query rows that the resize to the reference grid reads, and their sum with it;
- refinement: the other rows of the refining layers, summed to one p x p affinity, which is then applied `order` times.
  Recomputed refinement is the other way: fused attention for every application and layer, in place of all of that.

Elementwise work (sums over heads, resizing, blurs, the rate) is not counted, and tensors are in half precision.
"""

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from eval.cost.full_size import ARCHITECTURES, arguments, build
from goca_guidance.denoisers.adapters import denoiser_of, family_of
from goca_guidance.denoisers.base import DenoiserCall, Family


HALF, FLOAT = 2, 4  # bytes
REGIONS = 6  # five words and a special token


@dataclass(frozen=True)
class Layer:
    """Sizes of one attention call of one image: `pixels` queries on `grid`, `keys` (of them `image` pixels), `channels` of
    all `heads` together."""

    grid: tuple[int, ...]
    keys: int
    image: int
    heads: int
    channels: int

    @property
    def pixels(self) -> int:
        return math.prod(self.grid)

    @property
    def joint(self) -> bool:
        return 0 < self.image < self.keys


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of matrix products, exponentials, and bytes to and from memory."""

    flops: int = 0
    exponentials: int = 0
    bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.exponentials + other.exponentials, self.bytes + other.bytes)


def total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())


# ---- costs of one image ----------------------------------------------------------------------------------------------
def heads(layer: Layer) -> Cost:
    """z M: reads the attention output z [p c] and M [c c]."""
    p, c = layer.pixels, layer.channels
    return Cost(2 * p * c * c, 0, HALF * (p * c + c * c))


def probabilities(layer: Layer, rows: int, keys_read: bool = True) -> Cost:
    """softmax(q k^T) of some query rows in all heads; `keys_read` where the keys must come from memory."""
    n, c = layer.keys, layer.channels
    return Cost(2 * rows * n * c, rows * n * layer.heads, HALF * c * (rows + n * keys_read) * (rows > 0))


def reference(layer: Layer) -> Cost:
    """softmax(F F^T) of the dense features F [p c], written in float32."""
    p, c = layer.pixels, layer.channels
    return Cost(2 * p * p * c, p * p, HALF * p * c + FLOAT * p * p)


def agreement(layer: Layer, rows: int) -> Cost:
    """<A_p, A[rows]>: reads the pulled reference affinity."""
    return probabilities(layer, rows) + Cost(2 * rows * layer.keys, 0, FLOAT * rows * layer.image)


def products(pixels: int, regions: int, order: int) -> Cost:
    """A summed affinity [p p], written once, times the maps [p k], `order` times."""
    return Cost(2 * pixels * pixels * regions * order, 0, FLOAT * pixels * pixels * (1 + order))


def recomputed(layer: Layer, order: int) -> Cost:
    """Fused attention with the maps, padded to the width of a head, as values; q and k are read each time."""
    p, n, c = layer.pixels, layer.keys, layer.channels
    return Cost(4 * p * n * c * order, p * n * layer.heads * order, HALF * c * (p + n) * order)


def rows_read(layer: Layer, grid: tuple[int, ...]) -> int:
    """Query rows that the nearest resize to `grid` reads."""
    return math.prod(map(min, layer.grid, grid))


def added(step: "StockStep") -> dict[str, Cost]:
    """What GoCA-S-CFG adds, by part, and the cost of the recomputed refinement.

    Where the sink is read in the unconditional prediction, that one is aggregated too, by its own layer weights.
    """
    layers, preset, predictions = step.layers, step.family.preset, 1 + step.family.unconditional_sink
    text, compared, refining = (
        [layers[name] for name in names] for names in (preset.text, preset.self_attention, preset.refine)
    )
    known = {name: rows_read(layers[name], layers[preset.reference].grid) for name in preset.self_attention}
    covered = {name for name, rows in known.items() if layers[name].joint and rows == layers[name].pixels}
    unknown = [(layers[name], layers[name].pixels - known.get(name, 0), name not in known) for name in preset.refine]
    text_maps = [layers[name] for name in preset.text if name not in covered] * predictions
    weighted = text * predictions if preset.heads == "contribution" else []
    return {
        "heads": total(map(heads, weighted)),
        "cross": total(probabilities(layer, layer.pixels) for layer in text_maps),
        "reference": total([reference(layers[preset.reference])] * predictions),
        "agreement": total([*map(agreement, compared, known.values())] * predictions),
        "refinement": total(probabilities(*sizes) for sizes in unknown)
        + products(refining[0].pixels, REGIONS, preset.order),
        "recomputed": total(recomputed(layer, preset.order) for layer in refining),
    }


# ---- the stock step --------------------------------------------------------------------------------------------------
class _ReachedError(Exception):
    """The denoiser is called, with these arguments."""


def denoiser_inputs(pipe, call: dict) -> tuple[tuple, dict]:
    """What the stock pipeline gives to its denoiser at the first step."""

    def stop(module, args, kwargs):
        raise _ReachedError(args, kwargs)

    handle = denoiser_of(pipe.components).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        pipe(**call)
    except _ReachedError as reached:
        return reached.args
    finally:
        handle.remove()
    raise RuntimeError("Expected the pipeline to call its denoiser, but it did not.")


@dataclass(frozen=True)
class StockStep:
    """A stock step: operations, bytes of weights that it reads, and the sizes of the layers that GoCA reads."""

    family: Family
    flops: int
    weights: int
    layers: dict[str, Layer]


@torch.no_grad()
def stock_step(name: str, size: int | None = None) -> StockStep:
    """Counted on "meta", at the native size unless told; a pipeline with one prediction at a time reads its weights twice."""
    pipe, size = build(name, "meta", torch.float16), size or ARCHITECTURES[name].size
    denoiser = denoiser_of(pipe.components)
    family = family_of(denoiser)
    args, kwargs = denoiser_inputs(pipe, arguments(name, pipe, size, batch=1, steps=2))
    batch, latent = len(kwargs["encoder_hidden_states"]), size // pipe.vae_scale_factor
    text = sum(x.shape[1] for key, x in kwargs.items() if key.startswith("encoder_hidden_states"))
    with FlopCounterMode(display=False) as counter:
        layers = layer_sizes(family, DenoiserCall(batch, (latent, latent), text), args, kwargs)
    weights = HALF * sum(parameter.numel() for parameter in denoiser.parameters())
    return StockStep(family, counter.get_total_flops() * 2 // batch, weights * 2 // batch, layers)


def layer_sizes(family: Family, call: DenoiserCall, args: tuple, kwargs: dict) -> dict[str, Layer]:
    """Runs the denoiser once and notes the sizes of the attention calls that the preset names."""
    layers: dict[str, Layer] = {}

    def note(name, module, args, kwargs):
        inputs = dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)) | kwargs
        queries, other = inputs["hidden_states"].shape[1], inputs.get("encoder_hidden_states")
        text = 0 if other is None else other.shape[1]
        keys = text if name.endswith("attn2") else queries + text
        view = family.view(call, name, queries, keys)
        layers[name] = Layer(view.grid, keys, view.image.stop - view.image.start, module.heads, module.inner_dim)

    with ExitStack() as hooks:
        for name in family.preset.layers:
            module = family.attention_modules[name]
            hooks.callback(module.register_forward_pre_hook(partial(note, name), with_kwargs=True).remove)
        family.denoiser(*args, **kwargs)
    return layers


def added_flops(name: str, size: int) -> int:
    """Operations of GoCA's core in a step of one image."""
    parts = added(stock_step(name, size))
    return total(cost for part, cost in parts.items() if part != "recomputed").flops
