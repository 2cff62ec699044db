"""Every family's regions, foreground and scores against the releases' semantics (`tests/helpers/released.py`), in float64.

Random weights get louder queries: their attention is nearly even, and min-max of it mostly rounding. The prompts have a word
of several tokens, a word that stands twice, and different numbers of words; pictures are wider than high.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from goca_guidance import TINY_SD, GoCAConfig, GoCASCFGPipeline, SCFGConfig
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
SWITCHES = {"row_normalise": False, "reference_channels": 1, "drop_stop_words": False}
CONFIGS = [
    pytest.param(GoCAConfig(), id="default"),
    pytest.param(GoCAConfig(**SWITCHES), id="released"),
    pytest.param(GoCAConfig(heads="uniform", row_normalise=True), id="uniform"),
    pytest.param(GoCAConfig(heads="contribution"), id="contribution"),
]
TIE = 2e-5  # of scores in [0, 1]: nearer ones float32 may order otherwise
every_model = pytest.mark.parametrize("name", [*FAMILIES, "tiny-sd"])
every_config = pytest.mark.parametrize("config", CONFIGS)


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


def size_of(name: str) -> dict:
    return {"height": 64, "width": 96} if name == "tiny-sd" else wide(name)


@cache
def steps(name: str, goca: GoCAConfig, scfg: SCFGConfig) -> list[tuple]:
    """Of two guided steps: regions, and of each image the layers of the conditional and the unconditional prediction."""
    pipe, size = pipeline(name), size_of(name)
    denoiser = denoiser_of(pipe.components)
    calls = released.Calls(denoiser)
    asked = batch(name, PROMPTS, [0, 1]) | size
    family = "sd" if name == "tiny-sd" else name
    output = run(pipe, family, output_regions=True, goca=goca, scfg=scfg, **asked)
    names = sorted(family_of(denoiser).preset.layers)
    read = [released.attention(denoiser, names, call, tuple(size.values())) for call in calls.stop()]
    if name == "flux":  # predicts twice
        predictions = list(zip(read[::2], read[1::2], strict=True))
    else:
        predictions = [(both[len(PROMPTS) :], both[: len(PROMPTS)]) for both in read]
    assert len(output.regions) == len(predictions) == 2
    return [(regions, *both) for regions, both in zip(output.regions, predictions, strict=True)]


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
    preset = family_of(denoiser_of(pipeline(name).components)).preset
    rows = preset.row_normalise if config.row_normalise is None else config.row_normalise
    heads, channels = config.heads or preset.heads, config.reference_channels
    return released.GoCA(preset, positive, negative or {}, heads, channels, rows)


def regions_of(name: str, prompt: str, config: GoCAConfig) -> tuple[list[list[int]], list[int]]:
    """Positions of each region, and of the content: CLIP's `<sos>` is a region and no content."""
    every = prompt.split()
    words = [w for w in every if w not in DROPPED or not config.drop_stop_words]
    positions = [where for word, where in zip(every, places(name, prompt, every), strict=True) if word in words]
    return positions + [[0]] * (name not in END_SINK), sum(positions, [])


def assert_argmax(masks: torch.Tensor, scores: torch.Tensor) -> None:
    """Padding is empty; the others are where their score is highest, but for ties."""
    assert not masks[len(scores) :].any()
    scores = released.nearest(scores, masks.shape[1:])
    behind = scores.amax(0) - (scores * masks[: len(scores)]).sum(0)
    assert (behind > TIE).sum() == 0
    assert (behind > 0).float().mean() < 0.01
    assert (masks.flatten(1).any(1).sum()) > 1


def assert_foreground(foreground: torch.Tensor, background: torch.Tensor, threshold: float = 0.5) -> None:
    background = released.nearest(background, foreground.shape[1:])
    wrong = foreground != (background < threshold)
    assert ((background - threshold)[wrong].abs() > TIE).sum() == 0
    assert wrong.float().mean() < 0.01
    assert foreground.any() and not foreground.all()


# ---- guided generation -----------------------------------------------------------------------------------------------
@every_config
@every_model
def test_regions_are_the_released_ones(name, config):
    for prompt, masks, _, positive, _ in images(name, config):
        assert_argmax(masks, goca_of(name, config, positive).scores(*regions_of(name, prompt, config)))


@every_config
@every_model
def test_foreground_is_the_released_one(name, config):
    for prompt, _, foreground, positive, negative in images(name, config):
        reference = goca_of(name, config, positive, negative if name in NEGATIVE_SINK else None)
        assert_foreground(foreground, reference.background(sink_of(name, prompt)))


@every_model
def test_regions_and_foreground_of_scfg_are_the_released_ones(name):
    preset = family_of(denoiser_of(pipeline(name).components)).preset
    for prompt, masks, foreground, positive, negative in images(name, scfg=SCFGConfig(segmentor="s-cfg")):
        assert_argmax(masks, released.scfg_scores(preset, positive))
        sink = negative if name in NEGATIVE_SINK else positive
        background = released.scfg_background(preset, sink, sink_of(name, prompt))
        assert_foreground(foreground, background, threshold=0)


# ---- segmentation ----------------------------------------------------------------------------------------------------
@cache
def segmented(name: str, config: GoCAConfig, background: tuple[str, ...] | None = None):
    """Two noisy pictures; of each the layers."""
    pipe, size = pipeline(name), size_of(name)
    denoiser = denoiser_of(pipe.components)
    calls, shape = released.Calls(denoiser), tuple(size.values())
    pictures = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    found = pipe.segment([Image.fromarray(p) for p in pictures], CLASSES, goca=config, background=background, **size)
    names = sorted(family_of(denoiser).preset.layers)
    return found, [layers for call in calls.stop() for layers in released.attention(denoiser, names, call, shape)]


@every_config
@every_model
def test_scores_are_the_released_ones(name, config):
    found, read = segmented(name, config)
    words = places(name, ", ".join(CLASSES), CLASSES)
    for scores, layers in zip(found.scores, read, strict=True):
        reference = goca_of(name, config, layers).scores(words)
        torch.testing.assert_close(scores.double(), reference, atol=TIE, rtol=0)
