"""Random calls of everything public, with right, odd and wrong arguments: what hypothesis draws."""

import inspect
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hypothesis import strategies as st

from goca_guidance import Background, GoCAConfig, SCFGConfig
from goca_guidance.method.scfg import SCFGSegmentor
from goca_guidance.method.segmentor import GoCASegmentor
from tests.fuzz import values as v
from tests.fuzz.faults import FAULTS, Fault
from tests.fuzz.pairs import NAMES, SURROUNDINGS, pair
from tests.fuzz.tomls import TOMLS
from tests.fuzz.values import Made
from tests.helpers.guided import NEUTRAL, embedded


@dataclass(frozen=True)
class Case:
    """One call: what of, on which pipelines, with arguments of ours and of the stock pipeline, under what, with what fault."""

    surface: str
    family: str = ""
    ours: dict[str, Any] = field(default_factory=dict)
    stock: dict[str, Any] = field(default_factory=dict)
    around: str = ""
    fault: Fault | None = None

    def __repr__(self) -> str:
        around = {"on": self.family, "under": self.around, "fault": self.fault}
        shown = {**self.stock, **self.ours, **{name: value for name, value in around.items() if value}}
        return f"{self.surface}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


FAMILIES = st.sampled_from(["sd"] * 6 + ["sd3", "flux", "sdxl"] * 2 + ["tiny-sd", *NAMES])
AROUND = st.sampled_from([""] * 9 + SURROUNDINGS)


# ---- generation ------------------------------------------------------------------------------------------------------
def _callback(name, act):
    return Made(f"callback: {name}", lambda pair: lambda pipe, step, t, tensors: act(pair, pipe, tensors))


def _raise(pair, pipe, tensors):
    raise KeyError("a callback's own mistake")


CALLBACKS = [
    _callback("nothing", lambda pair, pipe, tensors: tensors),
    _callback("no dict", lambda pair, pipe, tensors: {}),
    _callback("double", lambda pair, pipe, tensors: {"latents": 2 * tensors["latents"]}),
    _callback(
        "segments", lambda pair, pipe, tensors: pair.ours.segment(v.noise(), ["cat"], height=32, width=32) and tensors
    ),
    _callback("previews", lambda pair, pipe, tensors: (pair.plain(), tensors)[1]),
    _callback("stops", lambda pair, pipe, tensors: setattr(pipe, "_interrupt", True) or tensors),
]
ODD_CALLBACKS = [
    _callback("raises", _raise),
    _callback("gives nan", lambda pair, pipe, tensors: {"latents": tensors["latents"] * v.NAN}),
    _callback("gives a number", lambda pair, pipe, tensors: 5),
    _callback("gives other names", lambda pair, pipe, tensors: {"x": 1}),
    _callback("gives another shape", lambda pair, pipe, tensors: {"latents": tensors["latents"][:, :1]}),
    _callback("calls ours", lambda pair, pipe, tensors: (pair.ours("a cat", **pair.call), tensors)[1]),
    *v.JUNK,
]
SCALES = [5.0, 5, 7.5, 1.0, 0, 1.5, 30.0, 0.5]
STOCK = {  # argument of a stock call: right values, odd ones
    "prompt": ([*v.RIGHT_PROMPTS], v.ODD_PROMPTS),
    "negative_prompt": (v.NEGATIVES, [["x"] * 3, 5, [None], *v.JUNK]),
    "guidance_scale": (SCALES, [-3, "5", [5], 1e30, *v.JUNK]),
    "true_cfg_scale": (SCALES, [-3, "5", [5], 1e30, *v.JUNK]),
    "num_inference_steps": ([1, 2, 3], [2.5, "2", *v.JUNK]),
    "height": ([16, 24, 32], [17, 8, 16.5, "16", -16, *[x for x in v.JUNK if x is not None]]),
    "width": ([16, 24, 32], [17, 8, 16.5, "16", -16, *[x for x in v.JUNK if x is not None]]),
    "num_images_per_prompt": ([1, 2], [2.5, "2", *v.JUNK]),
    "generator": (v.RIGHT_GENERATORS, v.ODD_GENERATORS),
    "latents": (v.LATENTS, v.ODD_LATENTS),
    "output_type": (["latent", "pt", "np", "pil"], ["jpeg", *v.JUNK]),
    "return_dict": (v.SWITCH, v.JUNK),
    "callback_on_step_end": (CALLBACKS, ODD_CALLBACKS),
    "callback": ([None], [5, "x"]),
    "callback_on_step_end_tensor_inputs": ([["latents"]], [["nothing"], "latents", *v.JUNK]),
    "eta": ([0.0, 0.5], v.JUNK),
    "guidance_rescale": ([0.0, 0.7], v.JUNK),
    "clip_skip": ([None, 1], [5, -1, *v.JUNK]),
    "timesteps": ([None, [900, 400]], [[], [5.5], [-1], [10, 900], [10**6], *v.JUNK]),
    "sigmas": ([None, [1.0, 0.5]], [[], [v.NAN], [-1.0], [0.1, 0.9], *v.JUNK]),
    "max_sequence_length": ([24, 16], [0, -1, 300, *v.JUNK]),
    "denoising_end": ([None, 0.5, 0.9], v.JUNK),
    "cross_attention_kwargs": ([None, {"scale": 1.0}], [{"x": 1}, *v.JUNK]),
    "joint_attention_kwargs": ([None, {"scale": 1.0}], [{"x": 1}, *v.JUNK]),
    "original_size": ([None, (16, 16)], [(1,), *v.JUNK]),
    "prompt_2": ([None, "a bus"], [["a", "b"], *v.JUNK]),
    "prompt_embeds": ([None], v.JUNK),
    "negative_prompt_embeds": ([None], v.JUNK),
    "ip_adapter_image": ([None], v.JUNK),
    "skip_guidance_layers": ([None, []], [[1], *v.JUNK]),
    "use_resolution_binning": ([False], v.JUNK),
    "clean_caption": (v.SWITCH, v.JUNK),
}


@cache
def _known(family: str) -> tuple[str, ...]:
    parameters = inspect.signature(pair(family).stock.__call__).parameters
    return tuple(name for name in STOCK if name in parameters)


def _pool(pool, odd: bool) -> st.SearchStrategy:
    right, wrong = pool
    return st.sampled_from(wrong) if odd else right if isinstance(right, st.SearchStrategy) else st.sampled_from(right)


def _odd(draw, names: list[str]) -> set[str]:
    """Which arguments get an odd value: most calls have none or one, for two would hide each other."""
    count = draw(st.sampled_from([0, 0, 0, 1, 1, 2]))
    return set(draw(st.permutations(names))[:count]) if names else set()


@st.composite
def generations(draw) -> Case:
    """Guided calls."""
    family = draw(FAMILIES)
    known = _known(family)
    names = draw(st.lists(st.sampled_from(known), unique=True, max_size=4))
    own = draw(st.lists(st.sampled_from(list(v.OURS)), unique=True, max_size=4))
    odd = _odd(draw, [*names, *own])
    stock = {"prompt": "a cat on grass", **{n: draw(_pool(STOCK[n], n in odd)) for n in names}}
    ours = {n: draw(_pool(v.OURS[n], n in odd)) for n in own}
    if draw(st.integers(0, 3)) == 0:
        ours |= draw(st.sampled_from([{"scfg": NEUTRAL}, {"use_scfg": False}]))
    if draw(st.integers(0, 24)) == 0:
        stock[draw(st.sampled_from(v.MISSPELT))] = draw(st.sampled_from([True, 1, None, "x"]))
    if draw(st.integers(0, 14)) == 0:
        stock, tokens = _with_embeddings(stock), st.sampled_from([*v.RIGHT_TOKENS[1:], *v.ODD_TOKENS])
        ours |= draw(st.just({}) | st.fixed_dictionaries({"region_tokens": tokens}))
    return Case("generate", family, ours, stock, draw(AROUND))


def _with_embeddings(stock: dict) -> dict:
    """Instead of the prompt, what the family's own encoders make of one."""
    names = (
        "prompt",
        "prompt_2",
        "prompt_embeds",
        "negative_prompt_embeds",
        "negative_prompt",
        "num_images_per_prompt",
        "clip_skip",
    )
    return {k: value for k, value in stock.items() if k not in names} | {"embeds": True}


@cache
def embeddings(family: str) -> dict:
    """Arguments with what a family's own encoders make of a prompt."""
    return embedded(pair(family).stock, "sd" if family == "tiny-sd" else family)


# ---- real images, words ----------------------------------------------------------------------------------------------
SIZE = ([16, 32, None], [17, 8, 16.5, "16", -16, *v.JUNK])
READING = {
    "timestep": ([None, 100, 0, 999, [50, 150]], [1000, -1, 2.5, [], ["1"], "100", [None], *v.JUNK]),
    "generator": (v.RIGHT_GENERATORS, v.ODD_GENERATORS),
    "height": SIZE,
    "width": SIZE,
}
SEGMENT = READING | {
    "images": (v.RIGHT_IMAGES, v.ODD_IMAGES),
    "classes": (v.CLASSES, v.ODD_CLASSES),
    "prompt": (
        [None, "a cat and a bus on grass", ["a cat, a bus and a potted plant, dog on grass"]],
        ["", "a dog", 5, [], [""], ["a", "b", "c"], *v.JUNK],
    ),
    "num_noises": ([1, 2], [0, -1, 1.5, "1", *v.JUNK]),
    "background": (
        [None, 0.5, 1, ["sky"], Background(("sky",), offset=0.1)],
        [v.NAN, "sky", [], [1], ["cat"], {}, *v.JUNK],
    ),
    "goca": v.OURS["goca"],
    "segmentor": ([GoCASegmentor], [SCFGSegmentor, *v.JUNK]),
}
DISCOVER = READING | {
    "images": (v.RIGHT_IMAGES, v.ODD_IMAGES),
    "threshold": ([0.5, 0.9, 0, 1], [-1, 2, "x", *v.JUNK]),
    "alpha": ([10.0, 1, 0.5], [0, -1, 1e30, *v.JUNK]),
    "size": ([8, 16], [0, -1, 2.5, *v.JUNK]),
}


@st.composite
def readings(draw, surface: str, pools: dict, always: tuple[str, ...]) -> Case:
    """Calls that read real images."""
    family = draw(FAMILIES)
    names = [*always, *draw(st.lists(st.sampled_from([n for n in pools if n not in always]), unique=True, max_size=3))]
    odd = _odd(draw, names)
    given = {n: draw(_pool(pools[n], n in odd)) for n in names}
    size = dict(zip(("height", "width"), _size_of(family), strict=True))
    return Case(surface, family, {**size, **given}, {}, draw(AROUND))


def _size_of(family):
    return pair(family).call["height"], pair(family).call["width"]


WORDS = st.builds(
    lambda family, prompt: Case("words", family, {"prompt": prompt}),
    FAMILIES,
    v.LETTERS | v.LETTERS | st.text(max_size=20) | st.sampled_from([*v.RIGHT_PROMPTS, *v.ODD_PROMPTS]),
)


# ---- configurations --------------------------------------------------------------------------------------------------
CONFIGURATIONS = {
    "GoCAConfig": (GoCAConfig, v.GOCA_FIELDS),
    "GoCAConfig.vanilla": (GoCAConfig.vanilla, v.GOCA_FIELDS),
    "GoCAConfig.released": (GoCAConfig.released, v.GOCA_FIELDS),
    "SCFGConfig": (SCFGConfig, v.SCFG_FIELDS),
    "Background": (Background, v.BACKGROUND_FIELDS),
}


@st.composite
def configurations(draw) -> Case:
    """A configuration of right fields, one of which may be anything."""
    name = draw(st.sampled_from(list(CONFIGURATIONS)))
    fields = CONFIGURATIONS[name][1]
    given = {
        n: draw(st.sampled_from(fields[n]))
        for n in draw(st.lists(st.sampled_from(list(fields)), unique=True, max_size=4))
    }
    if draw(st.booleans()):
        given[draw(st.sampled_from([*fields, "unknown"]))] = draw(st.sampled_from(v.JUNK) | v.NUMBERS)
    return Case(name, "", given)


BACKGROUNDS = st.builds(
    lambda value: Case("Background.of", "", {"value": value}),
    st.sampled_from([0.5, ["sky"], ("a", "b"), Background(threshold=1), [""], [1], *v.JUNK]) | v.NUMBERS,
)


# ---- all -------------------------------------------------------------------------------------------------------------
SEGMENTS = readings("segment", SEGMENT, ("images", "classes"))
DISCOVERIES = readings("discover", DISCOVER, ("images",))


@st.composite
def faulty(draw) -> Case:
    """A call with a fault in it, whose arguments are right."""
    family, around = draw(FAMILIES), draw(AROUND)
    if draw(st.integers(0, 3)):
        ours = {
            "goca": draw(v.CONFIGS),
            "scfg": draw(v.GUIDANCES),
            **draw(st.sampled_from([{}, {"output_regions": True}, {"output_negative_maps": True}])),
        }
        stock = {"prompt": draw(st.sampled_from(["a cat on grass", ["a cat", "a bus"]]))}
        stock |= (
            {"negative_prompt": "a dog"} if "output_negative_maps" in ours and isinstance(stock["prompt"], str) else {}
        )
        return Case("generate", family, ours, stock, around, draw(FAULTS))
    height, width = _size_of(family)
    given = {"images": v.RIGHT_IMAGES[0], "height": height, "width": width}
    if draw(st.booleans()):
        return Case("discover", family, given | {"size": 8}, {}, around, draw(FAULTS))
    return Case(
        "segment",
        family,
        given | {"classes": ["cat", "bus"], "background": draw(st.sampled_from([None, 0.5, ["sky"]]))},
        {},
        around,
        draw(FAULTS),
    )


FILES = TOMLS.map(lambda given: Case("TOML", "", given))
SHARES = [
    (9, generations()),
    (4, SEGMENTS),
    (1, DISCOVERIES),
    (4, faulty()),
    (2, WORDS),
    (3, configurations()),
    (1, BACKGROUNDS),
    (3, FILES),
]
_EACH = [each for share, each in SHARES for _ in range(share)]
CASES = st.sampled_from(range(len(_EACH))).flatmap(_EACH.__getitem__)
