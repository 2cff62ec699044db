"""Pools of right, odd and wrong values for the arguments of every public call."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

from goca_guidance import GoCAConfig, SCFGConfig


@dataclass(frozen=True)
class Made:
    """A value that each call makes anew from the pair of pipelines: generators have a state, tensors are long to read."""

    name: str
    make: Callable[[Any], Any]

    def __repr__(self) -> str:
        return f"<{self.name}>"


def made(values: dict, pair) -> dict:
    """Arguments as a call gets them."""
    return {name: value.make(pair) if isinstance(value, Made) else value for name, value in values.items()}


def fixed(name: str, value: Callable[[], Any]) -> Made:
    """A value that is the same for all pipelines."""
    return Made(name, lambda pair: value())


# ---- of any type -----------------------------------------------------------------------------------------------------
NAN, INF = float("nan"), float("inf")
JUNK = [None, True, False, 0, -1, 2, 1.5, NAN, INF, "", "x", "3", b"cat", [], {}, (), ["x"], {"x": 1}, int]
JUNK += [fixed("object()", object), fixed("numpy 2", lambda: np.int64(2)), fixed("numpy nan", lambda: np.float32(NAN))]
JUNK += [fixed("tensor 5.", lambda: torch.tensor(5.0)), fixed("tensor of 3", lambda: torch.ones(3))]
JUNK += [fixed("array of 3", lambda: np.ones(3)), fixed("a set", lambda: {1}), fixed("a lambda", lambda: len)]
NUMBERS = st.one_of(st.integers(-3, 40), st.floats(-2, 20), st.sampled_from([NAN, INF, -INF, True, None, "1", 1e30]))
LETTERS = st.text(st.sampled_from("aAb cdtos,.;:!?()[]'\"-_*<>|/\\\n\t\u00a0é猫🐈1 9"), max_size=24)
SWITCH = [True, False]


# ---- text ------------------------------------------------------------------------------------------------------------
RIGHT_PROMPTS = [
    "a cat on grass",
    "a cat and a bus on grass",
    "A CAT",
    "a red cat, a dog.",
    "((a cat:1.2)), [a bus]",
    "a cat behind a bus",
    ["a cat on grass"],
    ["a cat", "potted plant"],
    "猫 on grass",
    "of the",
    "it's a dog's",
    "a cat " * 30,
    "<cat> on grass",
    "a\tcat\non grass",
]
ODD_PROMPTS = [
    None,
    "",
    " ",
    "\u00a0",
    ",",
    [],
    [""],
    ["a cat", ""],
    ["a cat", 5],
    [None],
    ("a cat", "a dog"),
    5,
    b"a cat",
    {"a": 1},
]
ODD_PROMPTS += [[["a cat"]], fixed("array of a text", lambda: np.array(["a cat"])), *JUNK]
NEGATIVES = [None, "", "a dog", "blurry, grass", ["a dog"], ["", ""]]
CLASSES = [
    ["cat", "bus"],
    ["cat"],
    [["cat", "grass"]],
    ("cat", "grass"),
    ["potted plant", "dog"],
    ["person, hat", "cat"],
    ["CAT"],
]
ODD_CLASSES = [
    [],
    [[]],
    [""],
    ["\u00a0"],
    [","],
    ["cat", "cat"],
    ["cat", "Cat "],
    [1],
    [None],
    [["cat"], ["dog"]],
    [["cat"], []],
    "cat",
    ["bow (weapon)", "cat"],
    ["C++"],
    ["猫", "狗"],
    ["cat"] * 300,
    [b"cat"],
    [["cat"], "dog"],
    {"cat": 1},
    fixed("an array of names", lambda: np.array(["cat", "dog"])),
    fixed("a set of names", lambda: {"cat"}),
    ["a cat on the grass " * 20],
    ["."],
    ["the"],
    [np.str_("cat")],
    *JUNK,
]


# ---- ours ------------------------------------------------------------------------------------------------------------
GOCA_FIELDS = {
    "heads": [None, "contribution", "uniform"],
    "layers": ["agreement", "uniform", "manual"],
    "row_normalise": [None, True, False],
    "reference_channels": [None, 1, 3, 10_000],
    "rescale": SWITCH,
    "drop_stop_words": SWITCH,
    "refine_order": [None, 0, 1, 3],
    "blur_size": [1, 3, 5, 9],
    "blur_sigma": [0.1, 1.1, 4, 1e-30],
    "agreement_rows": [None, 1, 7, 10_000],
    "working_size": [None, 1, 4, 64],
}
SCFG_FIELDS = {
    "rate_min": [0.1, 0.8, 1],
    "rate_max": [1, 3.0, 100],
    "ceiling": [0.5, 15.0, 1e30],
    "smooth_size": [1, 3, 7],
    "smooth_sigma": [0.1, 0.7, 3],
    "segmentor": ["goca", "s-cfg"],
    "variance_channels": SWITCH,
    "every": [1, 2, 5],
    "equal_mean": SWITCH,
}
BACKGROUND_FIELDS = {
    "entities": [(), ("sky",), ["sky", "grass"]],
    "threshold": [None, 0.5, 0, 1],
    "offset": [0.2, 0, -1.0],
}


def configured(cls: type, fields: dict) -> st.SearchStrategy:
    """Configurations with some right fields."""
    return st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in fields.items()}).map(
        lambda given: cls(**given)
    )


CONFIGS = configured(GoCAConfig, GOCA_FIELDS)
GUIDANCES = configured(SCFGConfig, SCFG_FIELDS)


def _tokens(name: str, make: Callable[[], Any]) -> Made:
    return fixed(f"{{'cat': {name}}}", lambda: {"cat": make()})


RIGHT_TOKENS = [
    None,
    {"cat": [2]},
    {"cat": [2], "grass": [4]},
    {"cat": (2, 3), "bus": [1]},
    [{"cat": [2]}],
    {"a cat": range(1, 3)},
]
ODD_TOKENS = [
    {},
    [],
    [{}],
    {"cat": []},
    {"cat": 2},
    {"cat": "2"},
    {"cat": ["2"]},
    {"cat": [2.5]},
    {"cat": [2.0]},
    {"cat": [-1]},
    {"cat": [1000]},
    {"cat": [True]},
    {"cat": [None]},
    {"cat": [[2]]},
    {2: [2]},
    {"": [2]},
    {None: [2]},
    {("a",): [2]},
    {"cat": [2], "dog": [2]},
    {"cat": [2, 2]},
    {"cat": [0]},
    [{"cat": [2]}] * 3,
    [{"cat": [2]}, None],
    ["cat"],
    "cat",
    [("cat", [2])],
    {"cat": [NAN]},
    {"cat": None},
    {"cat": {2}},
    {"cat": {2: 1}},
    {"cat": [10**30]},
    _tokens("array", lambda: np.array([2])),
    _tokens("empty array", lambda: np.array([])),
    _tokens("array 2 x 2", lambda: np.ones((2, 2), int)),
    _tokens("tensor", lambda: torch.tensor([2, 3])),
    _tokens("scalar tensor", lambda: torch.tensor(2)),
    _tokens("mask", lambda: torch.tensor([False, True])),
    _tokens("floats", lambda: torch.tensor([2.0])),
    _tokens("generator", lambda: iter([2])),
    fixed("tensor of masks", lambda: torch.ones(2, 8)),
    fixed("array of masks", lambda: np.ones((2, 8))),
    *JUNK,
]
WORDS_OF_PROMPT = Made("words of 'a cat on grass'", lambda pair: pair.ours.words("a cat on grass"))
OURS = {  # argument of a guided call: right values, odd ones
    "use_scfg": (st.sampled_from(SWITCH), JUNK),
    "goca": (st.none() | CONFIGS, [SCFGConfig(), GoCAConfig, {"heads": "uniform"}, *JUNK]),
    "scfg": (st.none() | GUIDANCES, [GoCAConfig(), SCFGConfig, {"rate_min": 1}, *JUNK]),
    "scfg_start": (st.sampled_from([0, 0.0, 0.3, 0.5]), [1.5, -0.1, 1, *JUNK]),
    "scfg_stop": (st.sampled_from([1, 1.0, 0.9, 0.5]), [1.5, -0.1, 0, *JUNK]),
    "region_tokens": (st.sampled_from([*RIGHT_TOKENS, WORDS_OF_PROMPT]), ODD_TOKENS),
    "output_regions": (st.sampled_from(SWITCH), JUNK),
    "output_negative_maps": (st.sampled_from(SWITCH), JUNK),
}
MISSPELT = [
    "output_region",
    "use_cfg",
    "use_scgf",
    "scfg_begin",
    "scfg_config",
    "goca_config",
    "region_token",
    "rate_min",
    "ceiling",
    "segmentor",
    "heads",
    "refine_order",
    "output_maps",
    "output_negative_map",
    "drop_stopwords",
]


# ---- images ----------------------------------------------------------------------------------------------------------
def noise(mode: str = "RGB", size: tuple[int, int] = (20, 14)) -> Image.Image:
    """A picture of noise; `size` is width x height."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(pixels).convert(mode)


def _array(dtype, *shape, value=None) -> np.ndarray:
    return np.full(shape, value, dtype) if value is not None else np.random.default_rng(0).random(shape).astype(dtype)


MODES = ["RGB", "L", "RGBA", "P", "1", "LA", "CMYK", "YCbCr", "HSV", "I;16", "LAB"]
RIGHT_IMAGES = [fixed(f"a picture of mode {mode}", partial(noise, mode)) for mode in MODES]
RIGHT_IMAGES += [
    fixed("two pictures", lambda: [noise(), noise("L", (9, 31))]),
    fixed("8 x 8", lambda: noise("RGB", (8, 8))),
]
RIGHT_IMAGES += [
    fixed("floats", lambda: _array(np.float32, 12, 20, 3)),
    fixed("a wide one", lambda: noise("RGB", (90, 8))),
]
ODD_IMAGES = [
    fixed("7 x 9", lambda: noise("RGB", (7, 9))),
    fixed("mode I", lambda: noise("I")),
    fixed("mode F", lambda: noise("F")),
]
ODD_IMAGES += [
    fixed("grey array", lambda: _array(np.uint8, 12, 20)),
    fixed("4 channels", lambda: _array(np.float32, 12, 20, 4)),
]
ODD_IMAGES += [fixed("array of nan", lambda: _array(np.float32, 12, 20, 3, value=NAN))]
ODD_IMAGES += [
    fixed("array of 300", lambda: _array(np.int64, 12, 20, 3, value=300)),
    fixed("texts", lambda: np.full((9, 9, 3), "a")),
]
ODD_IMAGES += [
    fixed("objects", lambda: np.full((9, 9, 3), None)),
    fixed("channels first", lambda: torch.ones(3, 12, 20)),
]
ODD_IMAGES += [fixed("bools", lambda: np.ones((9, 9, 3), bool)), fixed("complex", lambda: np.ones((9, 9, 3), complex))]
ODD_IMAGES += [fixed("no pixels", lambda: np.ones((0, 9, 3))), fixed("a picture and a number", lambda: [noise(), 5])]
ODD_IMAGES += [
    fixed("a list in a list", lambda: [[noise()]]),
    fixed("a generator", lambda: iter([noise()])),
    "no file.png",
    ".",
]
ODD_IMAGES += [["no file.png"], __file__, "\0", *JUNK]


# ---- stock -----------------------------------------------------------------------------------------------------------
def seeded(seed: int = 0, count: int | None = None):
    """A generator, or a list of so many."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count or 1)]
    return generators if count else generators[0]


RIGHT_GENERATORS = [fixed("generator 0", seeded), fixed("a list of one generator", partial(seeded, count=1))]
ODD_GENERATORS = [
    fixed("three generators", partial(seeded, count=3)),
    fixed("numpy's", lambda: np.random.default_rng(0)),
    *JUNK,
]


def _latents(change: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> Callable:
    return lambda pair: change(torch.randn(pair.latent, generator=seeded()))


def _nan(x: torch.Tensor) -> torch.Tensor:
    x.view(-1)[0] = NAN
    return x


LATENTS = [Made("latents", _latents()), None]
ODD_LATENTS = [Made("latents of nan", _latents(_nan)), Made("latents of inf", _latents(lambda x: x / 0))]
ODD_LATENTS += [Made("latents in float64", _latents(lambda x: x.double())), Made("zeros", _latents(lambda x: 0 * x))]
ODD_LATENTS += [
    Made("whole latents", _latents(lambda x: x.long())),
    Made("two latents", _latents(lambda x: x.repeat(2, *[1] * (x.ndim - 1)))),
]
ODD_LATENTS += [
    Made("half of the latents", _latents(lambda x: x[:, : len(x[0]) // 2])),
    Made("wide", _latents(lambda x: x.repeat_interleave(2, -1))),
]
ODD_LATENTS += [Made("latents that require gradients", _latents(lambda x: x.requires_grad_())), *JUNK]
