"""TOML files of both long programs: right ones, ones with a wrong value, ones that are no TOML."""

import json
import math
from typing import Any

from hypothesis import strategies as st

from eval.generation.generator import GenerationSettings
from eval.segment.experiment import Experiment
from tests.fuzz.values import GOCA_FIELDS, SWITCH


READERS = {"segmentation": Experiment, "coco30k": GenerationSettings}
GENERATION = {
    "method": ["cfg", "scfg", "goca"],
    "captions": ["scenes"],
    "split": ["test", "validation", "train"],
    "count": [1, 7],
    "dtype": ["float32", "bfloat16"],
    "scheduler": ["DDIMScheduler", "EulerDiscreteScheduler"],
    "guidance_scale": [5.0, 3],
    "steps": [2, 50],
    "size": [32, 64],
    "batch": [1, 8],
    "seed": [0, 42],
    "one_seed": SWITCH,
}
METHODS = [
    {"goca": {}},
    {"vanilla": {}, "goca": {}},
    {"mine": {"base": "goca", "refine_order": 0}},
    {"diffsegmenter": {"template": "a {}"}},
    {"goca": {"background": {"kind": "offset", "values": [0.1]}}},
    {"diffcut": {}},
    {"fttm": {"crf": True}},
]
SEGMENTATION = {
    "methods": METHODS,
    "grid": [{}, {"refine_order": [0, 1], "heads": ["uniform"]}],
    "benchmark": ["scenes"],
    "split": ["test", "validation"],
    "limit": [1, 3],
    "protocol": ["standard", "goca"],
    "prompts": [{"source": "tags"}, {"source": "vocabulary"}, {"source": "written", "path": "prompts.json"}],
    "background": [{"kind": "offset", "values": [0.2]}, {"kind": "offset", "values": [0.1, 0.2]}],
    "tune": [0, 2],
    "dtype": ["float32", "bfloat16"],
    "size": [64],
    "timestep": [50, 100],
    "num_noises": [1, 2],
    "batch": [1, 8],
    "seed": [0, 5],
}
FIELDS = {"segmentation": SEGMENTATION, "coco30k": GENERATION}
WRONG = [
    True,
    0,
    -1,
    2.5,
    math.nan,
    math.inf,
    "",
    "x",
    "no",
    "3",
    [],
    ["x"],
    [1, 2.5],
    {},
    {"x": 1},
    {"goca": 5},
    {"goca": {"x": 1}},
    {"kind": "offset"},
    {"kind": "x", "values": [0.1]},
    {"kind": "offset", "values": ["x"]},
    {"kind": "offset", "values": []},
    {"kind": "offset", "values": [math.nan]},
    {"source": "x"},
    {"source": 5},
    {"source": "tags", "x": 1},
    {"source": "captions"},
    {"source": "captions", "path": 5},
    {"source": "captions", "path": "none.json"},
    {"goca": {"timestep": "x"}},
    {"goca": {"num_noises": 0}},
    {"goca": {"crf": "no"}},
    {"goca": {"background": 5}},
    {"goca": {"base": 5}},
    {"": {}},
    {"refine_order": 5},
    {"refine_order": []},
    {"heads": ["x"]},
    {"x": [1]},
    {"source": "endpoint"},
    {"source": "tagger", "threshold": "x"},
]
WRONG += [{"goca": {name: value}} for name in GOCA_FIELDS for value in (math.nan, "x", 1.5, [])]
GARBAGE = [
    "",
    "=",
    "a = ",
    "[methods",
    "a = 1\na = 2",
    "include = 5",
    'include = "none.toml"',
    'include = "config.toml"',
    "include = [1]",
    "methods = []",
    "[[methods]]",
    "[methods.goca]\nbase = 1979-05-27",
    "steps = 0x10",
    "\x00",
    "ä = 1",
    '"" = 1',
]


def text_of(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {text_of(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(text_of, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)


@st.composite
def _files(draw) -> dict:
    kind = draw(st.sampled_from(list(FIELDS)))
    fields = FIELDS[kind]
    given = {"methods": {"goca": {}}} if kind == "segmentation" else {}
    given |= {
        n: draw(st.sampled_from(fields[n]))
        for n in draw(st.lists(st.sampled_from(list(fields)), unique=True, max_size=5))
    }
    if draw(st.booleans()):
        given[draw(st.sampled_from([*fields, "unknown", "root"]))] = draw(st.sampled_from(WRONG))
    text = "\n".join(f"{name} = {text_of(value)}" for name, value in given.items())
    if draw(st.integers(0, 7)) == 0:
        text += "\n" + draw(st.sampled_from(GARBAGE) | st.text(max_size=20))
    return {"program": kind, "text": text}


TOMLS = _files()
