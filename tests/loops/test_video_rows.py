"""What a row says of a video denoiser's tokens, against the denoiser: which keys hear of a word, of a pixel; regions."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.cost.naive import NaiveSegmentor
from goca_guidance import GoCAConfig, GoCAGuidance
from goca_guidance.denoisers.adapters import denoiser_of, family_of
from goca_guidance.denoisers.base import Family
from goca_guidance.method.maps import nearest
from goca_guidance.method.records import TokenLayout
from tests.helpers import released
from tests.helpers.guided import guided
from tests.helpers.loops.every import LOOPS, stock
from tests.helpers.loops.kernels import Kernels, bound, copied
from tests.helpers.loops.tiny_loop import build, run
from tests.helpers.loops.video_places import Places, images_of, of_text, places_of, record


GRIDS = {  # tokens of the layers that are read: frames, rows, columns; of a frame by itself rows and columns
    "Wan": (3, 4, 2),
    "WanImageToVideo": (3, 4, 2),
    "WanVACE": (4, 4, 2),
    "WanAnimate": (3, 4, 2),
    "ChronoEdit": (2, 4, 2),
    "SkyReelsV2DiffusionForcing": (3, 4, 2),
    "AnyFlow": (3, 4, 2),
    "Helios": (3, 4, 2),
    "Cosmos2TextToImage": (1, 4, 2),
    "Cosmos2_5_Transfer": (3, 4, 2),
    "Allegro": (3, 4, 2),
    "LTX": (3, 8, 4),
    "LTXCondition": (3, 8, 4),
    "LTX2": (3, 8, 4),
    "Kandinsky5T2V": (3, 4, 2),
    "SanaVideo": (3, 4, 2),
    "CogVideoX": (3, 4, 2),
    "EasyAnimate": (3, 4, 2),
    "HunyuanVideo": (3, 4, 2),
    "HunyuanVideoFramepack": (3, 4, 2),
    "HunyuanVideo15": (3, 8, 4),
    "Mochi": (3, 4, 2),
    "Latte": (4, 8),
    "AnimateDiff": (16, 8),
    "AnimateDiffSDXL": (16, 8),
}
PROMPTS = ["a cat and a bus on grass", "potted plant"]
QUERIES = ("to_q", "to_query", "norm_q", "query_norm")  # made louder: random weights attend nearly evenly
POOLED = ("Mochi",)  # the denoiser makes one vector of the text too, which scales pixels
MIXED = ("HunyuanVideo", "HunyuanVideoFramepack", "HunyuanVideo15")  # and the text itself
CONVOLVED = ("SanaVideo", "AnimateDiff", "AnimateDiffSDXL")  # a pixel reaches its neighbours
NAMED = {"cat": [1], "grass": [2], "</s>": [0]}
every_row = pytest.mark.parametrize("name", GRIDS)


# ---- a denoiser and its first call -----------------------------------------------------------------------------------
@cache
def loop(name: str):
    return LOOPS[f"{name}Pipeline"]


def asked(name: str) -> dict[str, Any]:
    """Two prompts, where the stock loop takes two."""
    negative = {"negative_prompt": ["", "red"]} if "negative_prompt" in loop(name).call else {}
    return {"prompt": PROMPTS} | negative if loop(name).batch else {"prompt": PROMPTS[0]}


@cache
def first_call(name: str) -> tuple[Family, tuple[tuple, dict]]:
    """The adapter of the denoiser, and the first call of it in the stock loop."""
    pipe = stock(f"{name}Pipeline")
    denoiser = denoiser_of(pipe.components)
    with released.calls(denoiser) as seen:
        run(pipe, loop(name), **asked(name))
    return family_of(denoiser), seen[0]


def keys(name: str, call) -> dict[str, list[Tensor]]:
    """Of the layers that are read, those of each image, where no token hears of another."""
    family = first_call(name)[0]
    seen = Kernels(family.denoiser, sorted(family.preset.layers), silent=True)(call)
    return {
        layer: [each["key"][0] for each in images_of(of_text(family.denoiser, calls))] for layer, calls in seen.items()
    }


@cache
def silent(name: str) -> dict[str, list[Tensor]]:
    return keys(name, first_call(name)[1])


def grid_of(name: str, pixels: int) -> tuple[int, ...]:
    """By hand; U-Nets have coarser ones."""
    *frames, height, width = GRIDS[name]
    shrink = math.isqrt(math.prod(GRIDS[name]) // pixels) if not frames else 1
    return *frames, height // shrink, width // shrink


def places(name: str, layer: str, image: int) -> Places:
    """By hand."""
    family, call = first_call(name)
    count = silent(name)[layer][image].shape[1]
    pixels = count if not GRIDS[name][2:] and not layer.endswith("attn2") else math.prod(GRIDS[name])
    return places_of(family.denoiser)(bound(family.denoiser, call), image, count, pixels, layer)


def moved(name: str, call, image: int, alike: int = 1) -> dict[str, set[int]]:
    """Keys of an image that are others in a call; those of other images, but so many alike, are the same."""
    found = {}
    for layer, of_images in keys(name, call).items():
        changes = [(a - b).abs().amax((0, 2)) for a, b in zip(of_images, silent(name)[layer], strict=True)]
        assert not any(change.any() for i, change in enumerate(changes) if i // alike != image // alike), layer
        found[layer] = set((changes[image] > 1e-4 * changes[image].max()).nonzero().flatten().tolist())
    return found


def changed(name: str, argument: str, index, axis: int = -1) -> tuple[tuple, dict]:
    """The first call with another vector in an argument, at an index."""
    family, call = first_call(name)
    other = copied(bound(family.denoiser, call))
    value = other[argument][0] if isinstance(other[argument], tuple) else other[argument]
    vector = value.movedim(axis, -1)[index]
    vector += torch.linspace(-1, 2, vector.shape[-1])  # no norm takes it away
    return (), other


# ---- text and pixels -------------------------------------------------------------------------------------------------
@every_row
def test_a_token_of_the_text_is_the_key_that_the_row_says(name):
    family, call = first_call(name)
    before = family.text(bound(family.denoiser, call))
    image = len(before[0]) - 1
    batch, frames = len(family.sample(bound(family.denoiser, call))), 1
    if family.by_frame:
        frames = family.sample(bound(family.denoiser, call)).shape[2]
    text = bound(family.denoiser, call)["encoder_hidden_states"]
    text = text[0] if isinstance(text, tuple) else text
    row = image * (len(text) // batch)  # AnimateDiff's text is repeated for each frame
    other = changed(name, "encoder_hidden_states", (row, 0, 1) if text.ndim == 4 else (row, 1))
    after = family.text(bound(family.denoiser, other))
    expected = torch.cat([(a != b).any(-1) for a, b in zip(after, before, strict=True)], 1)[image].nonzero()
    assert len(expected) == 1
    for layer, found in moved(name, other, image * frames, 1 if len(text) > batch else frames).items():
        words, _ = places(name, layer, image * frames)
        wanted = {words[place] for place in expected.flatten().tolist()} if words else set()
        assert wanted <= found, layer
        assert found & set(words) == wanted or name in MIXED, layer
        assert found == wanted or name in POOLED or (name in MIXED and found <= set(words)), layer


@every_row
def test_a_pixel_is_the_key_that_the_row_says(name):
    if name in CONVOLVED:
        pytest.skip("its neighbours hear of it without attention")
    family, call = first_call(name)
    argument = next(a for a in family.samples if a in bound(family.denoiser, call))
    (*_, rows, columns), frame = GRIDS[name], min(1, GRIDS[name][0] - 1)
    token = (frame * rows + 1) * columns + columns - 1  # a later frame, second row, last column
    if bound(family.denoiser, call)[argument].ndim == 3:
        other = changed(name, argument, (0, token))
    else:
        side = family.patch
        other = changed(name, argument, (0, frame, side, side * columns - 1), getattr(family, "channel", 1))
    image, token = (frame, token - frame * rows * columns) if family.by_frame else (0, token)
    for layer, found in moved(name, other, image).items():
        _, pixels = places(name, layer, image)
        assert found == ({pixels[token]} if pixels else set()), layer


# ---- regions ---------------------------------------------------------------------------------------------------------
@cache
def guided_step(name: str) -> tuple:
    """Regions of one guided step, the layout of its tokens, and the calls of its predictions."""
    pipe = build(f"{name}Pipeline", loop(name))
    layouts: list[TokenLayout] = []
    for part, module in denoiser_of(pipe.components).named_modules():
        if part.endswith(QUERIES) and getattr(module, "weight", None) is not None:
            module.weight.data *= 4
    with pytest.MonkeyPatch.context() as patch, released.calls(denoiser_of(pipe.components)) as seen:
        patch.setattr("goca_guidance.hooks.guided.GoCASegmentor.__init__", _noting(layouts))
        if hasattr(pipe, "guider"):
            pipe.guider = GoCAGuidance(pipe.guider.guidance_scale, stop=0.5, region_tokens=NAMED)
            with pipe.guider.watching(pipe, keep_regions=True) as watched:
                run(pipe, loop(name), **asked(name))
            regions = watched.results()[0]
        else:
            regional = {"region_tokens": NAMED, "scfg_stop": 0.5, "output_regions": True}
            regions = run(guided(pipe), loop(name), **asked(name), **regional)["regions"]
    return denoiser_of(pipe.components), regions[0], layouts[0], seen[:2]


def _noting(layouts):
    from goca_guidance.method.segmentor import GoCASegmentor

    first = GoCASegmentor.__init__

    def init(self, config, preset, layout, **kwargs):
        layouts.append(layout)
        first(self, config, preset, layout, **kwargs)

    return init


def records(name: str, denoiser, call) -> list[list]:
    """Of each image of a call, a record of each layer that is read."""
    family = family_of(denoiser)
    look = Kernels(denoiser, sorted(family.preset.layers))
    found: list[list] = []
    for layer, calls in look(call).items():
        for image, one in enumerate(images_of(of_text(denoiser, calls))):
            count, queries = one["key"].shape[2], one["query"].shape[2]
            pixels = min(queries, math.prod(GRIDS[name]))
            where = places_of(denoiser)(bound(family.denoiser, call), image, count, pixels, layer)
            normed = getattr(denoiser.get_submodule(layer), "norm_q", None) is not None
            alone = normed and not (where[0] and where[1])
            raw = look.raw[layer][image : image + 1] if layer in look.raw and alone else None
            if len(found) <= image:
                found.append([])
            found[image].append(record(layer, one, raw, where, grid_of(name, pixels)))
    return found


@every_row
def test_regions_are_those_of_the_definition(name):
    """In float64, of attention that torch's function was seen to compute."""
    denoiser, regions, layout, calls = guided_step(name)
    family = family_of(denoiser)
    frames = regions.masks.shape[2] if family.by_frame else 1
    predictions = [of_image for call in calls for of_image in records(name, denoiser, call)]
    images = len(regions.labels) * frames
    first, second = predictions[:images], predictions[images : 2 * images]
    separate = len(records(name, denoiser, calls[0])) == images
    positive, negative = (first, second) if separate else (second, first)
    size = regions.masks.shape[3:] if family.by_frame else regions.masks.shape[2:]
    config = GoCAConfig(layers="agreement" if family.preset.self_attention else "uniform")
    for image in range(images):
        naive = NaiveSegmentor(
            config, family.preset, _of_image(layout, image), family.unconditional_sink, _projections(denoiser, family)
        )
        naive.dtype = torch.float64
        for branch, of_images in ((1, positive), (0, negative)):
            for each in of_images[image]:
                naive.keep(each, (branch,))
        expected, scores = naive.regions(tuple(size)), naive.scores()
        video, frame = divmod(image, frames)
        masks = regions.masks[video][:, frame] if family.by_frame else regions.masks[video]
        foreground = regions.foreground[video][:, frame] if family.by_frame else regions.foreground[video]
        sure = nearest(scores.topk(2, 1).values.diff(dim=1).abs() > 1e-4, tuple(size))[0]
        assert sure.float().mean() > 0.5
        assert torch.equal(masks & sure, expected.masks[0] & sure)
        assert (foreground == expected.foreground[0]).float().mean() > 0.98


def _of_image(layout: TokenLayout, image: int) -> TokenLayout:
    one = slice(image, image + 1)
    return TokenLayout(
        layout.labels[one], layout.columns[one], layout.groups[one].double(), layout.content[one], layout.sink[one]
    )


def _projections(denoiser, family) -> dict[str, Tensor]:
    if family.preset.heads == "uniform":
        return {}
    return {name: denoiser.get_submodule(name).to_out[0].weight.mT.double() for name in family.preset.text}
