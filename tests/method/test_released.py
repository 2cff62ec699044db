"""Every family's regions, foreground and scores against the releases' semantics (`tests/helpers/released.py`), in float64.

Random weights get louder queries: else their attention is nearly even, and min-max of it mostly rounding. The prompts have a
word of several tokens, a word that stands twice, and different numbers of words; pictures are wider than high.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from goca_guidance import TINY_SD, GoCAConfig, GoCASCFGPipeline, SCFGConfig
from goca_guidance.config import LayerPreset
from goca_guidance.denoisers.adapters import denoiser_of, family_of
from tests.helpers import released
from tests.helpers.families import FAMILIES, run, stock_pipeline
from tests.helpers.guided import END_SINK, batch, guided, wide


PROMPTS = ["a cat and a zebra on grass", "potted plant"]
DROPPED = ("a", "and", "on")
CLASSES, ENTITIES = ["cat", "zebra", "potted plant"], ["grass", "sky"]
TEXTS = {  # tokenizers of the text that a denoiser sees, and the place of their first token; else the tokenizer, and 0
    "flux": {"tokenizer_2": 0},
    "sd3": {"tokenizer": 0, "tokenizer_3": 24},
    "hunyuan": {"tokenizer": 0, "tokenizer_2": 77},
}
NEGATIVE_SINK = ("sd", "hunyuan")  # the token that looks at the background is the negative prompt's `<sos>`

# ---- models and choices: "flux" is tiny, "flux:deep" has the layers of Flux.1, for which there is a released preset ----
DEEP: dict[str, dict] = {
    "sd": {
        "block_out_channels": (16, 16, 32, 32),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
    },
    "sdxl": {
        "block_out_channels": (16, 16, 32),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (2, 2, 4),
        "layers_per_block": 2,
    },
    "pixart-sigma": {"num_layers": 28},
    "flux": {"num_layers": 19, "num_single_layers": 38},
    "hunyuan": {"num_layers": 40},
}
ORDERS = {"sd:deep": 2, "sdxl:deep": 2, "pixart-sigma:deep": 5, "flux:deep": 2, "hunyuan:deep": 4}  # of refinement
EMBEDDED = "sd:embedded"
CHOICES: dict[str, dict] = {
    "default": {},
    "released": {"row_normalise": False, "reference_channels": 1, "drop_stop_words": False},
    "heads": {"heads": "the other kind", "row_normalise": True},
    "vanilla": {"heads": "uniform", "layers": "uniform", "rescale": False},
}
every_model = pytest.mark.parametrize("name", [*FAMILIES, EMBEDDED])
every_choice = pytest.mark.parametrize(
    ("name", "choice"),
    [(name, "default") for name in (*FAMILIES, *ORDERS, EMBEDDED)]
    + [(name, choice) for name in FAMILIES if name != "pixart-alpha" for choice in ("released", "heads", "vanilla")],
)


# ---- ours ------------------------------------------------------------------------------------------------------------
@cache
def pipeline(name: str) -> GoCASCFGPipeline:
    if name == EMBEDDED:
        pipe = GoCASCFGPipeline.from_pretrained(TINY_SD, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        return pipe
    stock = stock_pipeline(family(name))
    if name in ORDERS:
        which, tiny = FAMILIES[family(name)].denoiser, denoiser_of(stock.components)
        torch.manual_seed(0)
        deep = type(tiny).from_config({**tiny.config, **DEEP[family(name)]}).eval()
        stock = stock_pipeline(family(name), **{which: deep})
    for layer, module in denoiser_of(stock.components).named_modules():
        if layer.endswith(("to_q", "norm_q")):
            module.weight.data *= 8
    return guided(stock)


def family(name: str) -> str:
    return name.partition(":")[0]


@cache
def preset(name: str) -> LayerPreset:
    return family_of(denoiser_of(pipeline(name).components)).preset


@cache
def replay(name: str) -> released.Replay:
    return released.Replay(denoiser_of(pipeline(name).components), sorted(preset(name).layers))


def config_of(name: str, choice: str) -> GoCAConfig:
    kind = "uniform" if preset(name).heads == "contribution" else "contribution"
    return GoCAConfig(**CHOICES[choice] | ({"heads": kind} if choice == "heads" else {}))


def size_of(name: str) -> dict:
    return {"height": 64, "width": 96} if name == EMBEDDED else wide(family(name))


@cache
def steps(name: str, goca: GoCAConfig, scfg: SCFGConfig) -> list[tuple]:
    """Of each guided step: regions, and of each image the layers of the conditional and the unconditional prediction.

    Two steps of the tiny models with the defaults, else one.
    """
    pipe, size, batched = pipeline(name), size_of(name), batch(family(name), PROMPTS, [0, 1])
    stop = 1 if name in FAMILIES and (goca, scfg) == (GoCAConfig(), SCFGConfig()) else 0.5
    asked = {"goca": goca, "scfg": scfg, "scfg_stop": stop, "output_regions": True}
    with released.calls(denoiser_of(pipe.components)) as seen:
        regions = run(pipe, family(name), **batched, **size, **asked).regions
    assert len(regions) == 2 * stop
    found = []
    for step, of_step in enumerate(regions):
        calls = (
            seen[2 * step : 2 * step + 2] if family(name) == "flux" else seen[step : step + 1]
        )  # Flux predicts twice
        read = [image for call in calls for image in replay(name).layers(call, tuple(size.values()))]
        halves = read[: len(PROMPTS)], read[len(PROMPTS) :]
        found.append((of_step, *(halves if family(name) == "flux" else halves[::-1])))
    return found


def images(name: str, goca: GoCAConfig = GoCAConfig(), scfg: SCFGConfig = SCFGConfig()) -> Iterator[tuple]:  # noqa: B008
    """Prompt, masks k H W, foreground 1 H W, layers of the conditional and the unconditional prediction."""
    for regions, positive, negative in steps(name, goca, scfg):
        for image, prompt in enumerate(PROMPTS):
            masks = regions.masks[image]
            assert (masks.sum(0) == 1).all()
            yield prompt, masks, regions.foreground[image], positive[image], negative[image]


# ---- the reference ---------------------------------------------------------------------------------------------------
def texts(name: str, prompt: str) -> list[tuple]:
    """Tokenizer, ids and first place of each part of the text."""
    found = (
        (getattr(pipeline(name), part), start) for part, start in TEXTS.get(family(name), {"tokenizer": 0}).items()
    )
    return [(tokenizer, tokenizer(prompt).input_ids, start) for tokenizer, start in found]


def places(name: str, prompt: str, words: list[str]) -> list[list[int]]:
    """Of words in the order of the prompt: where their tokens stand, in all parts of the text."""
    found: list[list[int]] = [[] for _ in words]
    for tokenizer, ids, start in texts(name, prompt):
        at = 0
        for word, positions in zip(words, found, strict=True):
            spelled = tokenizer(word, add_special_tokens=False).input_ids
            at = next(i for i in range(at, len(ids)) if ids[i : i + len(spelled)] == spelled)
            positions.extend(range(start + at, start + at + len(spelled)))
            at += len(spelled)
    return found


def sink_of(name: str, prompt: str) -> int:
    """`<sos>`, or `</s>` where there is none."""
    tokenizer, ids, start = texts(name, prompt)[-1]
    return start + ids.index(tokenizer.eos_token_id) if family(name) in END_SINK else 0


def goca_of(name: str, config: GoCAConfig, positive: dict, negative: dict | None = None) -> released.GoCA:
    rows = preset(name).row_normalise if config.row_normalise is None else config.row_normalise
    heads, channels = config.heads or preset(name).heads, config.reference_channels
    return released.GoCA(preset(name), positive, negative or {}, heads, channels, rows, plain=not config.rescale)


def regions_of(name: str, prompt: str, config: GoCAConfig) -> tuple[list[list[int]], list[int]]:
    """Positions of each region, and of the content: CLIP's `<sos>` is a region and no content."""
    every = prompt.split()
    named = zip(every, places(name, prompt, every), strict=True)
    words = [positions for word, positions in named if word not in DROPPED or not config.drop_stop_words]
    return words + [[0]] * (family(name) not in END_SINK), [position for positions in words for position in positions]


@pytest.mark.parametrize("name", ORDERS)
def test_deep_models_have_a_released_preset(name):
    assert preset(name).order == ORDERS[name]


# ---- guided generation -----------------------------------------------------------------------------------------------
@every_choice
def test_regions_are_the_released_ones(name, choice):
    config = config_of(name, choice)
    for prompt, masks, _, positive, _ in images(name, config):
        released.assert_argmax(masks, goca_of(name, config, positive).scores(*regions_of(name, prompt, config)))


@every_choice
def test_foreground_is_the_released_one(name, choice):
    config = config_of(name, choice)
    for prompt, _, foreground, positive, negative in images(name, config):
        reference = goca_of(name, config, positive, negative if family(name) in NEGATIVE_SINK else None)
        released.assert_foreground(foreground, reference.background(sink_of(name, prompt)))


@every_model
def test_conditional_foreground_is_the_sinks_own_region(name):
    """Its score as a region's: rescaled, refined, below one half (ours)."""
    config = GoCAConfig()
    for prompt, _, foreground, positive, _ in images(name, config, SCFGConfig(foreground="conditional")):
        _, content = regions_of(name, prompt, config)
        released.assert_foreground(
            foreground, goca_of(name, config, positive).scores([[sink_of(name, prompt)]], content)
        )


@every_model
def test_regions_and_foreground_of_scfg_are_the_released_ones(name):
    for prompt, masks, foreground, positive, negative in images(name, scfg=SCFGConfig(segmentor="s-cfg")):
        released.assert_argmax(masks, released.scfg_scores(preset(name), positive))
        sink = negative if family(name) in NEGATIVE_SINK else positive
        background = released.scfg_background(preset(name), sink, sink_of(name, prompt))
        released.assert_foreground(foreground, background, threshold=0)


def other_forms(reference: released.GoCA) -> dict[str, released.GoCA]:
    """Each with one step done in another way."""
    preset = reference.preset
    return {
        "heads": replace(reference, heads="contribution" if reference.heads == "uniform" else "uniform"),
        "channels": replace(reference, channels=1),
        "reference": replace(reference, preset=replace(preset, reference=preset.text[0])),
        "unrefined": replace(reference, preset=replace(preset, order=0)),
        "order": replace(reference, preset=replace(preset, order=preset.order + 1)),
    }


@every_model
def test_another_form_of_a_step_would_be_seen(name):
    """No map is the same with a step done in another way: the tests above can fail."""
    prompt, _, _, positive, negative = next(images(name))
    reference = goca_of(name, GoCAConfig(), positive, negative if family(name) in NEGATIVE_SINK else None)
    sink, words = sink_of(name, prompt), regions_of(name, prompt, GoCAConfig())
    for form, other in other_forms(reference).items():
        assert (other.background(sink) - reference.background(sink)).abs().max() > 100 * released.TIE, form
        assert (other.scores(*words) - reference.scores(*words)).abs().max() > 100 * released.TIE, form


# ---- segmentation ----------------------------------------------------------------------------------------------------
@cache
def segmented(name: str, config: GoCAConfig, background: tuple[str, ...] | None = None, classes: int = len(CLASSES)):
    """Two noisy pictures, and the layers of each."""
    pipe, size = pipeline(name), size_of(name)
    shape = tuple(size.values())
    pictures = list(np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8))
    with released.calls(denoiser_of(pipe.components)) as seen:
        found = pipe.segment(pictures, CLASSES[:classes], goca=config, background=background, **size)
    return found, [layers for call in seen for layers in replay(name).layers(call, shape)]


@every_choice
def test_scores_are_the_released_ones(name, choice):
    config = config_of(name, choice)
    found, read = segmented(name, config)
    words = places(name, ", ".join(CLASSES), CLASSES)
    content = [position for positions in words for position in positions]
    for scores, layers in zip(found.scores, read, strict=True):
        reference = goca_of(name, config, layers).scores(words, content)
        torch.testing.assert_close(scores.double(), reference, atol=released.TIE, rtol=0)


@every_model
def test_background_is_the_released_one(name):
    """Its score is the entities' supporting map, at the picture's size, and 0.2."""
    found, read = segmented(name, GoCAConfig(), tuple(ENTITIES))
    words = places(name, ", ".join([*CLASSES, *ENTITIES]), [*CLASSES, *ENTITIES])
    content = [position for positions in words for position in positions]
    for labels, layers in zip(found.label_maps, read, strict=True):
        reference = goca_of(name, GoCAConfig(), layers)
        background = reference.supporting(words[len(CLASSES) :], content) + 0.2
        scores = torch.cat([reference.scores(words[: len(CLASSES)], content), background])
        scores = released.bilinear(scores, tuple(labels.shape))
        released.assert_argmax(torch.stack([labels == k for k in range(len(scores))]), scores)


@every_model
def test_a_single_class_is_its_share_of_all_tokens(name):
    found, read = segmented(name, GoCAConfig(), classes=1)
    words = places(name, CLASSES[0], CLASSES[:1])
    for scores, layers in zip(found.scores, read, strict=True):
        reference = goca_of(name, GoCAConfig(), layers).scores(words, words[0])
        torch.testing.assert_close(scores.double(), reference, atol=released.TIE, rtol=0)
