"""What a row says of a denoiser's tokens, against the denoiser: which keys hear of a word, and regions by the definition."""

import math
from functools import cache

import diffusers
import pytest
import torch
from torch import Tensor

from goca_guidance import GoCAGuidance
from goca_guidance.denoisers.adapters import denoiser_of, family_of
from goca_guidance.denoisers.base import Family
from goca_guidance.denoisers.unets import UNetFamily
from goca_guidance.method.records import Regions
from tests.helpers import released
from tests.helpers.guided import guided
from tests.helpers.loops.every import LOOPS, stock
from tests.helpers.loops.image_places import FIRST, Places, layer_of, looked, places_of
from tests.helpers.loops.kernels import bound, copied
from tests.helpers.loops.tiny_loop import build, run


PROMPTS = ["a cat and a bus on grass", "potted plant"]
ROWS = """AuraFlow CogView3Plus CogView4 HiDreamImage HunyuanImage IF Ideogram4 Kandinsky3 Kolors Lumina Lumina2 PRX Sana
StableCascadePrior StableDiffusionLatentUpscale StableDiffusionUpscale""".split()  # one pipeline for each
QUERIES = ("to_q", "norm_q", "q_rms_norm")  # made louder: random weights attend nearly evenly
POOLED = ("IF", "Lumina")  # the denoiser makes one vector of the text too, which scales pixels
MIXED = ("HunyuanImage",)  # that scales the text itself
CONVOLVED = ("Sana",)  # so are U-Nets: a pixel reaches its neighbours
TOKENS = {  # arguments that are text, with their axes of images and tokens
    "encoder_hidden_states": (0, 1),
    "encoder_hidden_states_2": (0, 1),
    "encoder_hidden_states_t5": (0, 1),
    "encoder_hidden_states_llama3": (1, 2),
    "clip_text": (0, 1),
}
every_row = pytest.mark.parametrize("name", ROWS)


@cache
def loop(name: str):
    return LOOPS[f"{name}Pipeline"]


def prompts(name: str) -> list[str]:
    return PROMPTS if loop(name).batch else PROMPTS[:1]


@cache
def first_call(name: str) -> tuple[Family, tuple[tuple, dict]]:
    """The adapter of the denoiser, and the first call of it in the stock loop."""
    pipe = stock(f"{name}Pipeline")
    denoiser = denoiser_of(pipe.components)
    with released.calls(denoiser) as seen:
        run(pipe, loop(name), prompts(name))
    return family_of(denoiser), seen[0]


@cache
def silent(name: str) -> dict[str, Tensor]:
    """Keys of the layers that are read, where no token hears of another."""
    return keys(name, first_call(name)[1])


def keys(name: str, call) -> dict[str, Tensor]:
    family = first_call(name)[0]
    seen = looked(family.denoiser, sorted(family.preset.layers), call, silent=True)
    return {layer: of_layer["key"] for layer, of_layer in seen.items()}


def places(name: str, layer: str, image: int) -> Places:
    """By hand."""
    family, call = first_call(name)
    count = silent(name)[layer].shape[2]
    return places_of(family.denoiser)(bound(family.denoiser, call), image, count, layer)


def moved(name: str, call, image: int) -> dict[str, set[int]]:
    """Keys of an image that are others in a call; those of other images are the same."""
    found = {}
    for layer, key in keys(name, call).items():
        change = (key - silent(name)[layer]).abs().amax((1, 3))
        others = [i for i in range(len(change)) if i != image]
        assert not change[others].any(), layer
        found[layer] = set((change[image] > 1e-4 * change.max()).nonzero().flatten().tolist())
    return found


def changed(name: str, argument: str, *index) -> tuple[tuple, dict]:
    """The first call with another vector in an argument, at an index."""
    family, call = first_call(name)
    given = copied(bound(family.denoiser, call))
    vector = given[argument][index]
    vector += torch.linspace(-1, 2, vector.shape[-1])  # no norm takes it away
    return (), given


# ---- text and pixels -------------------------------------------------------------------------------------------------
@every_row
def test_a_token_of_the_text_is_the_key_that_the_row_says(name):
    family, call = first_call(name)
    before = family.text(bound(family.denoiser, call))
    for argument, axes in TOKENS.items():
        value = bound(family.denoiser, call).get(argument)
        if value is None:
            continue
        for image in {0, value.shape[axes[0]] - 1}:
            token = FIRST.get(name, 0) + 1 + image % 2
            index = [slice(None)] * (axes[1] + 1)
            index[axes[0]], index[axes[1]] = image, token
            other = changed(name, argument, *index)
            after = family.text(other[1])
            rows = [(a != b).any(-1) for a, b in zip(after, before, strict=True)]
            expected = torch.cat(rows, 1)[image].nonzero().flatten().tolist()
            assert expected
            for layer, found in moved(name, other, image).items():
                text, _ = places(name, layer, image)
                wanted = {text[place] for place in expected} if text else set()
                assert wanted <= found, layer
                assert found & set(text) == wanted or name in MIXED, layer
                assert found == wanted or name in POOLED or (name in MIXED and found <= set(text)), layer


@every_row
def test_a_pixel_is_the_key_that_the_row_says(name):
    family, call = first_call(name)
    given = bound(family.denoiser, call)
    if isinstance(family, UNetFamily) or name in CONVOLVED or family.packed:
        pytest.skip("its neighbours hear of it without attention, or it is a token of packed latents")
    sample = next(argument for argument in family.samples if argument in given)
    columns = given[sample].shape[-1] // family.patch
    y, x = family.patch, 2 * family.patch - 1  # second row, second column
    for layer, found in moved(name, changed(name, sample, 0, slice(None), y, x), 0).items():
        _, pixels = places(name, layer, 0)
        assert found == ({pixels[columns + 1]} if pixels else set()), layer


@every_row
def test_the_view_is_what_is_said_by_hand(name):
    """For each image, whatever the length of its text."""
    family, (args, kwargs) = first_call(name)
    call = family.call(args, kwargs)
    for layer, key in silent(name).items():
        queries = math.prod(family.grid(layer, call.latent))
        view = next(v for q in (queries, key.shape[2]) if (v := family.view(call, layer, q, key.shape[2])) is not None)
        for image in range(call.batch):
            order = list(range(key.shape[2])) if view.order is None else view.order[image].tolist()
            text, pixels = places(name, layer, image)
            assert order[view.text][: len(text)] == text
            assert order[view.image] == pixels


# ---- regions ---------------------------------------------------------------------------------------------------------
def named(name: str) -> dict[str, list[int]]:
    start = FIRST.get(name, 0)
    return {"cat": [start + 1], "grass": [start + 2], "</s>": [start]}


@cache
def ours(name: str) -> diffusers.DiffusionPipeline:
    """Guided by the loop, or by a guider."""
    pipe = build(f"{name}Pipeline", loop(name))
    if hasattr(pipe, "guider"):
        pipe.guider = GoCAGuidance(pipe.guider.guidance_scale, stop=0.5, region_tokens=named(name))
    else:
        pipe = guided(pipe)
    for part, module in denoiser_of(pipe.components).named_modules():
        if part.endswith(QUERIES) and module.weight is not None:
            module.weight.data *= 8
    return pipe


@cache
def guided_step(name: str) -> tuple:
    """Regions of one guided step, and of each image the layers of the conditional and the unconditional prediction."""
    pipe, images = ours(name), len(prompts(name))
    denoiser = denoiser_of(pipe.components)
    family, layers = family_of(denoiser), sorted(family_of(denoiser).preset.layers)
    with released.calls(denoiser) as seen:
        (regions,) = _regions(name, pipe)
    read = [of_image for call in seen[:2] for of_image in _layers(denoiser, layers, call)]
    first, second = read[:images], read[images : 2 * images]
    conditional_first = loop(name).conditional_first
    if conditional_first is None:  # of two calls the first one is, of a batch the second half
        conditional_first = len(_layers(denoiser, layers[:1], seen[0])) == images
    return family, regions, *((first, second) if conditional_first else (second, first))


def _regions(name: str, pipe) -> list[Regions]:
    if not hasattr(pipe, "guider"):
        asked = {"region_tokens": named(name), "scfg_stop": 0.5, "output_regions": True}
        return run(pipe, loop(name), prompts(name), **asked).regions
    with pipe.guider.watching(pipe, keep_regions=True) as seen:
        run(pipe, loop(name), prompts(name))
    return seen.results()[0]


def _layers(denoiser, layers, call) -> list[dict[str, released.Layer]]:
    seen, given = looked(denoiser, layers, call), bound(denoiser, call)
    sample = next(given[n] for n in ("sample", "hidden_states") if n in given)
    height, width = sample.shape[-2:] if sample.ndim == 4 else (2, 1)  # so are the pictures of packed latents
    found = []
    for image in range(len(seen[layers[0]]["query"])):
        of_image = {}
        for name in layers:
            text, pixels = places_of(denoiser)(given, image, seen[name]["key"].shape[2], name)
            count = len(pixels) or seen[name]["query"].shape[2]
            rows = round(math.sqrt(count * height / width))
            of_image[name] = layer_of(denoiser, name, seen[name], image, (text, pixels), (rows, count // rows))
        found.append(of_image)
    return found


@every_row
def test_regions_are_those_of_the_definition(name):
    family, regions, positive, negative = guided_step(name)
    preset, start = family.preset, FIRST.get(name, 0)
    words = [[start + 1], [start + 2]]
    for image, (layers, others) in enumerate(zip(positive, negative, strict=True)):
        sink = others if family.unconditional_sink else {}
        reference = released.GoCA(preset, layers, sink, preset.heads, None, preset.row_normalise)
        released.assert_argmax(regions.masks[image], reference.scores(words, [start + 1, start + 2]))
        released.assert_foreground(regions.foreground[image], reference.background(start))


# ---- words -----------------------------------------------------------------------------------------------------------
WORDS = {  # where "cat" and "grass" of "a cat on grass" stand in the text, and the end where it is the sink
    "AuraFlow": ([1], [3], [4]),
    "CogView3Plus": ([1], [3], [4]),
    "CogView4": ([13], [15]),  # 16 tokens, of which the first ten are padding
    "HiDreamImage": ([1, 26, 50], [3, 28, 52], [4]),  # three texts of 24 tokens; Llama's have a start and no end
    "IF": ([1], [3], [4]),
    "Ideogram4": ([2040], [2042], [2043]),  # 2048 tokens, and five of the template behind the prompt
    "Kandinsky3": ([1], [3], [4]),
    "Kolors": ([253], [255]),
    "Lumina": ([5], [7]),
    "PRX": ([2], [4]),
    "Sana": ([2], [4]),  # the last tokens of what follows an instruction
    "StableCascadePrior": ([2], [4]),
    "StableDiffusionLatentUpscale": ([2], [4]),
    "StableDiffusionUpscale": ([2], [4]),
}


@pytest.mark.parametrize("name", WORDS)
def test_words_stand_where_it_is_said_by_hand(name):
    found = ours(name).words("a cat on grass")
    assert [found[word] for word in ("cat", "grass", "</s>") if word in found] == list(WORDS[name])


def test_words_behind_a_system_prompt():
    pipe = ours("Lumina2")
    before = len(pipe.tokenizer(f"{pipe.system_prompt} <Prompt Start> a").input_ids)
    assert pipe.words("a cat on grass")["cat"] == [before]
