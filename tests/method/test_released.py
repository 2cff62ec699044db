"""Every family's regions, foreground and scores against the releases' semantics (`tests/helpers/released.py`), in float64.

Random weights get louder queries: their attention is nearly even, and min-max of it mostly rounding. The prompts have a word
of several tokens, a word that stands twice, and different numbers of words; pictures are wider than high.
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
NEGATIVE_SINK = ("sd", "hunyuan", "tiny-sd")  # the token that looks at the background is the negative prompt's `<sos>`
RELEASED = (("row_normalise", False), ("reference_channels", 1), ("drop_stop_words", False))
OTHER = (("heads", "the other one"), ("row_normalise", True))
TIE = 2e-5  # of scores in [0, 1]: nearer ones float32 may order otherwise
MODELS = [*FAMILIES, "tiny-sd"]
every_model = pytest.mark.parametrize("name", MODELS)
every_choice = pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param(name, changes, id=f"{name}-{kind}")
        for name in MODELS
        for kind, changes in {"default": (), "released": RELEASED, "heads": OTHER}.items()
        if name != "tiny-sd" or kind != "heads"
    ],
)


# ---- ours ------------------------------------------------------------------------------------------------------------
@cache
def pipeline(name: str) -> GoCASCFGPipeline:
    if name == "tiny-sd":
        pipe = GoCASCFGPipeline.from_pretrained(TINY_SD, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        return pipe
    pipe = guided(stock_pipeline(name))
    for layer, module in denoiser_of(pipe.components).named_modules():
        if layer.endswith(("to_q", "norm_q")):
            module.weight.data *= 8
    return pipe


@cache
def preset(name: str) -> LayerPreset:
    return family_of(denoiser_of(pipeline(name).components)).preset


@cache
def replay(name: str) -> released.Replay:
    return released.Replay(denoiser_of(pipeline(name).components), sorted(preset(name).layers))


def config_of(name: str, changes: tuple) -> GoCAConfig:
    heads = "uniform" if preset(name).heads == "contribution" else "contribution"
    return GoCAConfig(**{k: heads if k == "heads" else v for k, v in changes})


def size_of(name: str) -> dict:
    return {"height": 64, "width": 96} if name == "tiny-sd" else wide(name)


@cache
def steps(name: str, goca: GoCAConfig, scfg: SCFGConfig) -> list[tuple]:
    """Of each guided step: regions, and of each image the layers of the conditional and the unconditional prediction.

    Two steps of tiny models with the defaults, else one.
    """
    pipe, size = pipeline(name), size_of(name)
    stop = 1 if (goca, scfg) == (GoCAConfig(), SCFGConfig()) and name != "tiny-sd" else 0.5
    asked = (
        batch(name, PROMPTS, [0, 1]) | size | {"goca": goca, "scfg": scfg, "scfg_stop": stop, "output_regions": True}
    )
    with released.calls(denoiser_of(pipe.components)) as seen:
        regions = run(pipe, "sd" if name == "tiny-sd" else name, **asked).regions
    assert len(regions) == 2 * stop
    found = []
    for step, of_step in enumerate(regions):
        calls = seen[2 * step : 2 * step + 2] if name == "flux" else seen[step : step + 1]  # Flux predicts twice
        read = [image for call in calls for image in replay(name).layers(call, tuple(size.values()))]
        halves = read[: len(PROMPTS)], read[len(PROMPTS) :]
        found.append((of_step, *(halves if name == "flux" else halves[::-1])))
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
    found = ((getattr(pipeline(name), part), start) for part, start in TEXTS.get(name, {"tokenizer": 0}).items())
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
    return start + ids.index(tokenizer.eos_token_id) if name in END_SINK else 0


def goca_of(name: str, config: GoCAConfig, positive: dict, negative: dict | None = None) -> released.GoCA:
    rows = preset(name).row_normalise if config.row_normalise is None else config.row_normalise
    heads, channels = config.heads or preset(name).heads, config.reference_channels
    return released.GoCA(preset(name), positive, negative or {}, heads, channels, rows)


def regions_of(name: str, prompt: str, config: GoCAConfig) -> tuple[list[list[int]], list[int]]:
    """Positions of each region, and of the content: CLIP's `<sos>` is a region and no content."""
    every = prompt.split()
    named = zip(every, places(name, prompt, every), strict=True)
    words = [positions for word, positions in named if word not in DROPPED or not config.drop_stop_words]
    return words + [[0]] * (name not in END_SINK), [position for positions in words for position in positions]


def assert_argmax(masks: torch.Tensor, scores: torch.Tensor) -> None:
    """Padding is empty; the others are where their score is highest, but for ties."""
    assert not masks[len(scores) :].any()
    scores = released.nearest(scores, masks.shape[1:])
    behind = scores.amax(0) - (scores * masks[: len(scores)]).sum(0)
    assert (behind > TIE).sum() == 0
    assert (behind > 0).float().mean() < 0.01
    assert masks.flatten(1).any(1).sum() > 1


def assert_foreground(foreground: torch.Tensor, background: torch.Tensor, threshold: float = 0.5) -> None:
    background = released.nearest(background, foreground.shape[1:])
    wrong = foreground != (background < threshold)
    assert ((background - threshold)[wrong].abs() > TIE).sum() == 0
    assert wrong.float().mean() < 0.01
    assert 0 < foreground.sum() < foreground.numel()


# ---- guided generation -----------------------------------------------------------------------------------------------
@every_choice
def test_regions_are_the_released_ones(name, changes):
    config = config_of(name, changes)
    for prompt, masks, _, positive, _ in images(name, config):
        assert_argmax(masks, goca_of(name, config, positive).scores(*regions_of(name, prompt, config)))


@every_choice
def test_foreground_is_the_released_one(name, changes):
    config = config_of(name, changes)
    for prompt, _, foreground, positive, negative in images(name, config):
        reference = goca_of(name, config, positive, negative if name in NEGATIVE_SINK else None)
        assert_foreground(foreground, reference.background(sink_of(name, prompt)))


@every_model
def test_conditional_foreground_is_the_sinks_own_region(name):
    """Its score as a region's: rescaled, refined, below one half (ours)."""
    config = GoCAConfig()
    for prompt, _, foreground, positive, _ in images(name, config, SCFGConfig(foreground="conditional")):
        _, content = regions_of(name, prompt, config)
        assert_foreground(foreground, goca_of(name, config, positive).scores([[sink_of(name, prompt)]], content))


@every_model
def test_regions_and_foreground_of_scfg_are_the_released_ones(name):
    for prompt, masks, foreground, positive, negative in images(name, scfg=SCFGConfig(segmentor="s-cfg")):
        assert_argmax(masks, released.scfg_scores(preset(name), positive))
        sink = negative if name in NEGATIVE_SINK else positive
        background = released.scfg_background(preset(name), sink, sink_of(name, prompt))
        assert_foreground(foreground, background, threshold=0)


def other_forms(reference: released.GoCA) -> dict[str, released.GoCA]:
    """Each with one step done in another way."""
    preset, heads = reference.preset, {"uniform": "contribution", "contribution": "uniform"}[reference.heads]
    first, orders = (
        replace(preset, reference=preset.text[0]),
        [replace(preset, order=n) for n in (0, preset.order + 1)],
    )
    return {
        "heads": replace(reference, heads=heads),
        "channels": replace(reference, channels=1),
        "reference": replace(reference, preset=first),
        "unrefined": replace(reference, preset=orders[0]),
        "order": replace(reference, preset=orders[1]),
    }


@every_model
def test_another_form_of_a_step_would_be_seen(name):
    """No map is nearly even, nor the same with a step done in another way: the tests above can fail."""
    prompt, _, _, positive, negative = next(images(name))
    reference = goca_of(name, GoCAConfig(), positive, negative if name in NEGATIVE_SINK else None)
    sink, words = sink_of(name, prompt), regions_of(name, prompt, GoCAConfig())
    spread = reference.spread(reference.sink_share(sink))
    assert spread.max() > 1.02 * spread.min()
    for form, other in other_forms(reference).items():
        assert (other.background(sink) - reference.background(sink)).abs().max() > 100 * TIE, form
        assert (other.scores(*words) - reference.scores(*words)).abs().max() > 100 * TIE, form


# ---- segmentation ----------------------------------------------------------------------------------------------------
@cache
def segmented(name: str, config: GoCAConfig, background: tuple[str, ...] | None = None):
    """Two noisy pictures, and the layers of each."""
    pipe, size = pipeline(name), size_of(name)
    shape = tuple(size.values())
    pictures = list(np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8))
    with released.calls(denoiser_of(pipe.components)) as seen:
        found = pipe.segment(pictures, CLASSES, goca=config, background=background, **size)
    return found, [layers for call in seen for layers in replay(name).layers(call, shape)]


@every_choice
def test_scores_are_the_released_ones(name, changes):
    config = config_of(name, changes)
    found, read = segmented(name, config)
    words = places(name, ", ".join(CLASSES), CLASSES)
    content = [position for positions in words for position in positions]
    for scores, layers in zip(found.scores, read, strict=True):
        reference = goca_of(name, config, layers).scores(words, content)
        torch.testing.assert_close(scores.double(), reference, atol=1e-5, rtol=0)


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
        assert_argmax(torch.stack([labels == k for k in range(len(scores))]), scores)
