"""What a row of facts says of a denoiser's sequence, against what moves when a token is changed; regions by a reference."""

import math
from dataclasses import replace
from functools import cache

import diffusers
import pytest
import torch

from goca_guidance.denoisers.adapters import denoiser_of, family_of
from tests.helpers import released
from tests.helpers.guided import guided
from tests.helpers.loops.every import LOOPS
from tests.helpers.loops.kernels import Kernels
from tests.helpers.loops.probe import Probe
from tests.helpers.loops.qwen import picture
from tests.helpers.loops.tiny_loop import TinyLoop, build, run
from tests.helpers.loops.trace import traced
from tests.helpers.released import assert_argmax, assert_foreground, calls


ROWS = """QwenImage QwenImageEditPlus QwenImageLayered QwenImage21 ZImage ZImageControlNet ZImageOmni Flux2Klein
Flux2KleinInpaint Flux2 Chroma FluxKontext OvisImage LongCatImage LongCatImageEdit Bria BriaFibo BriaFiboEdit BriaFibo2 Krea2
ErnieImage""".split()
MIXED = ()  # whose text other layers mix before: its block moves as a whole, the token most
TOKENS = (0, 1, 3)
PICTURES = {  # further arguments of a call: other pictures than the loop's small call has
    "QwenImage21 beside a picture": {"image": [picture(64, 64, "RGBA")], "output_resolution": 64},
    "Flux2Klein beside a picture": {"image": picture(64, 64)},
    "ZImageOmni alone": {"image": None},
}
every_row = pytest.mark.parametrize("name", [*ROWS, *PICTURES])


def stock_of(name: str) -> diffusers.DiffusionPipeline:
    return build(f"{name.split()[0]}Pipeline", loop_of(name))


def loop_of(name: str) -> TinyLoop:
    loop = LOOPS[f"{name.split()[0]}Pipeline"]
    return replace(loop, call=loop.call | PICTURES.get(name, {}))


@cache
def probed(name: str):
    """The family, its call, and the probe of the first call of the denoiser, a conditional one."""
    stock = stock_of(name)
    denoiser = denoiser_of(stock.components)
    with calls(denoiser) as seen:
        _, steps = traced(run, stock, loop_of(name))
    family, (args, kwargs) = family_of(denoiser), seen[0]
    probe = Probe(denoiser, sorted(family.preset.layers), seen[0], tokens(steps))
    return family, family.call(args, kwargs), probe


def tokens(steps) -> int | None:
    """Of packed latents, what the scheduler gets."""
    return steps[0].given.shape[1] if steps[0].given.ndim == 3 else None


def laid_out(name: str, layer: str):
    """A layer's view, and where it says that the tokens stand."""
    family, call, probe = probed(name)
    sizes = probe.sizes(layer)
    view = family.view(call, layer, sizes.queries, sizes.keys)
    places = list(range(sizes.keys)) if view.order is None else view.order[0].tolist()
    return view, places


@every_row
def test_a_token_of_the_text_is_the_key_that_moves_with_it(name):
    family, call, probe = probed(name)
    for token in TOKENS:
        moved = probe.of_token(token)
        for layer in family.preset.text:
            view, places = laid_out(name, layer)
            text = places[view.text]
            assert len(text) == call.text
            assert moved[layer][0] == text[token]
            assert set(moved[layer]) <= set(text)
            assert len(moved[layer]) == 1 or name in MIXED


@every_row
def test_a_pixel_is_the_query_and_the_key_that_move_with_it(name):
    family, _, probe = probed(name)
    first = laid_out(name, family.preset.self_attention[0])[0]
    width, count = first.grid[-1], first.image.stop - first.image.start
    for pixel in (0, 1, width, count - 1):
        queries, keys = probe.of_pixel(pixel, count)
        for layer in family.preset.layers:
            view, places = laid_out(name, layer)
            if layer in family.preset.self_attention:
                assert keys[layer] == [places[view.image][pixel]]
            sizes = probe.sizes(layer)
            alike = view.image.stop and sizes.queries == sizes.keys
            own = places[view.image] if alike else range(sizes.queries)[view.queries or slice(None)]
            assert queries[layer] == [own[pixel]]


# ---- regions ---------------------------------------------------------------------------------------------------------
CAT, GRASS, SINK = 1, 3, 2  # places in the text


@cache
def found(name: str):
    """Regions of the first guided step, and the reference on its conditional prediction, whose attention is seen from outside.

    Random weights get louder queries: else their attention is nearly even, and min-max of it mostly rounding.
    """
    stock = stock_of(name)
    denoiser = denoiser_of(stock.components)
    for layer, module in denoiser.named_modules():
        if layer.endswith(("to_q", "norm_q")):
            module.weight.data *= 8
    ours, preset = guided(stock), family_of(denoiser).preset
    places = {"cat": [CAT], "grass": [GRASS], "</s>": [SINK]}
    with calls(denoiser) as seen:
        output, steps = traced(run, ours, loop_of(name), region_tokens=places, output_regions=True)
    regions = output.regions[0]
    names, image = sorted(preset.layers), 0 if loop_of(name).conditional_first else -1
    probe, asked = Probe(denoiser, names, seen[0], tokens(steps)), Kernels(denoiser, names)(seen[0])
    ratio = regions.masks.shape[-2] / regions.masks.shape[-1]
    layers = {layer: seen_layer(probe, layer, asked[layer][probe.which[layer]], image, ratio) for layer in names}
    return regions, released.GoCA(preset, layers, heads=preset.heads, row_normalise=preset.row_normalise)


def seen_layer(probe: Probe, name: str, given: dict, image: int, ratio: float) -> released.Layer:
    """Words and pixels stand where the probe found them. Heads that are uniform need no projection."""
    q, k, v = (given[which][image].double() for which in ("query", "key", "value"))
    logits = q @ k.mT * (given.get("scale") or q.shape[-1] ** -0.5)
    if (mask := given.get("attn_mask")) is not None:
        mask = mask[image % len(mask)]
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.double()
    pixels = sorted(probe.rows[name])
    probs = logits.softmax(-1)[:, pixels]
    height = round(math.sqrt(len(pixels) * ratio))
    text, image_keys = (probs[..., sorted(keys[name])] for keys in (probe.text, probe.pixels))
    features = {"output": (probs @ v).transpose(0, 1).flatten(1)}
    return released.Layer((height, len(pixels) // height), text, image_keys, torch.empty(0), features)


@pytest.mark.parametrize("name", [n for n in (*ROWS, *PICTURES) if n not in ("QwenImageLayered", "Flux2")])
def test_regions_and_foreground_are_the_references(name):
    """`tests/helpers/released.py`, in float64."""
    regions, reference = found(name)
    assert_argmax(regions.masks[0], reference.scores([[CAT], [GRASS]], [CAT, GRASS]))
    assert_foreground(regions.foreground[0], reference.background(SINK))
