"""Some seconds of `make fuzz`: nothing raw, no leak, no difference; and that the fuzzer finds what it is to find."""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from goca_guidance import GoCASCFGPipeline, SCFGConfig
from goca_guidance.hooks.watch import Watch
from tests.fuzz import kills
from tests.fuzz import tally as t
from tests.fuzz.cases import CONFIGURATIONS, Case
from tests.fuzz.faults import Fault, lines
from tests.fuzz.pairs import pair
from tests.fuzz.trial import attempt
from tests.fuzz.values import RIGHT_IMAGES
from tests.helpers.guided import NEUTRAL
from tests.helpers.places import ROOT


GUIDED = Case("generate", "sd", {}, {"prompt": "a cat on grass"})
SEGMENTED = Case("segment", "sd", {"images": RIGHT_IMAGES[0], "classes": ["cat", "bus"], "height": 16, "width": 16})
DISCOVERED = Case("discover", "sd", {"images": RIGHT_IMAGES[0], "size": 8, "height": 16, "width": 16})


# ---- some seconds ----------------------------------------------------------------------------------------------------
def test_random_calls():
    """In a process of its own, without the tests' type checks, which would refuse odd arguments before the library does."""
    program = [sys.executable, "-m", "tests.fuzz", "--calls", "60", "--lives", "0", "--kills", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"^all +60 +\d\d +\d\d +0 +0 +0$", ran.stdout, re.MULTILINE), ran.stdout


def test_a_pipelines_life():
    t.lives(0, 3, steps=5)


@pytest.mark.parametrize("name", kills.PROGRAMS)
def test_killed_and_started_again(name, tmp_path):
    assert list(kills.kills(kills.PROGRAMS[name], tmp_path, 2, seed=1)) == ["", ""]


FOUND = [  # once
    Case("generate", "flux", {}, {"prompt": "a cat on grass", "width": 2}),  # no pixel token
    Case("generate", "sd", {"scfg_start": object()}, {"prompt": "a cat"}),
    Case("generate", "sd", {"region_tokens": {"cat": iter([2])}}, {"prompt": "a cat"}),
    Case("generate", "sd", {}, {"prompt": "a cat", "output_region": True}),
    Case("discover", "sd", {"images": RIGHT_IMAGES[0], "size": "3"}),
    Case("words", "pixart-alpha", {"prompt": 2}),
]


@pytest.mark.parametrize("case", FOUND)
def test_what_was_found_is_refused(case):
    """Or caught by the tests' own type checks."""
    outcome = attempt(case)
    assert outcome.verdict == "refused" or outcome.detail.startswith("TypeCheckError"), outcome


OPENERS = {
    "__enter__",
    "installed",
    "eager_here",
    "wrap",
    "watch",
    "_enter_module",
    "_leave_module",
    "leave",
    "hook_here",
    "_in_call",
}


@pytest.mark.parametrize("case", [GUIDED, SEGMENTED, DISCOVERED], ids=["generate", "segment", "discover"])
def test_interrupted_at_any_line_that_opens_something(case):
    attempt(case)
    with lines() as found:
        assert attempt(case).verdict == "fine"
    opening = {line: number for number, line in reversed([*enumerate(found, 1)]) if line and line[1] in OPENERS}
    assert len({function for _, function, _ in opening}) >= 6
    faults = [replace(case, fault=Fault("line", 0, number, "KeyboardInterrupt")) for number in opening.values()]
    assert [outcome for fault in faults if (outcome := attempt(fault)).verdict != "refused"] == []


# ---- what it finds ---------------------------------------------------------------------------------------------------
def test_a_hook_that_is_left_is_a_leak(monkeypatch):
    monkeypatch.setattr(Watch, "forget", lambda self: self.family.denoiser.register_forward_hook(lambda *args: None))
    outcome = attempt(GUIDED)
    assert (outcome.verdict, outcome.kind) == ("leak", "generate: hooks")
    monkeypatch.undo()
    assert attempt(GUIDED).verdict == "fine"  # on another pair


def test_a_weight_that_is_changed_is_a_leak(monkeypatch):
    def forget(self):
        with torch.no_grad():
            self.family.denoiser.conv_in.weight.mul_(2)

    monkeypatch.setattr(Watch, "forget", forget)
    assert "weights" in attempt(GUIDED).kind


def test_another_output_at_rate_one_is_a_difference(monkeypatch):
    neutral = Case("generate", "sd", {"scfg": NEUTRAL}, {"prompt": "a cat on grass"})
    assert attempt(neutral).verdict == "fine"
    kind = type(pair("sd").ours)
    real = kind.__call__

    def call(self, *args, **kwargs):
        output = real(self, *args, **kwargs)
        output.images += 1e-6
        return output

    monkeypatch.setattr(kind, "__call__", call)
    assert attempt(neutral).kind == "generate: another output than stock's"


def test_an_error_without_the_houses_form_is_raw(monkeypatch):
    def segment(self, *args, **kwargs):
        raise ValueError("oops")

    monkeypatch.setattr(GoCASCFGPipeline, "segment", segment)
    case = Case("segment", "sd", {"images": None, "classes": ["cat"], "num_noises": 2})
    outcome = attempt(case)
    assert (outcome.verdict, outcome.detail) == ("raw", "ValueError: oops")
    assert t.smallest(outcome.kind, case) == Case("segment", "sd", {})


def test_what_stock_refuses_may_be_refused():
    assert attempt(Case("generate", "sd", {}, {"prompt": "a cat", "num_inference_steps": "2"})).verdict == "refused"


@pytest.mark.parametrize("place", ["module", "scheduler", "line"])
def test_faults_are_real(place):
    which = [name for name, _ in pair("sd").modules].index("unet.")
    outcome = attempt(Case("generate", "sd", {}, {"prompt": "a cat"}, fault=Fault(place, which, 0, "MemoryError")))
    assert (outcome.verdict, outcome.detail) == ("refused", "injected")


def test_a_field_that_is_taken_in_the_wrong_type_is_a_difference(monkeypatch):
    def taken(**given):
        config = SCFGConfig()
        vars(config).update(given)
        return config

    assert attempt(Case("SCFGConfig", "", {"every": "2"})).verdict == "refused"
    monkeypatch.setitem(CONFIGURATIONS, "SCFGConfig", (taken, {}))
    for value in ("2", True, 2.5):
        assert attempt(Case("SCFGConfig", "", {"every": value})).verdict == "difference"
    assert attempt(Case("SCFGConfig", "", {"ceiling": float("nan")})).verdict == "difference"


def test_a_killed_run_that_ends_otherwise_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(kills.coco30k, "commit", lambda: str(time.monotonic()))
    (wrong,) = kills.kills(kills.PROGRAMS["coco30k"], tmp_path, 1)
    assert wrong.endswith("other run/settings.json")


def test_a_seed_repeats_itself():
    drawn = [[], []]
    for cases in drawn:
        t.run(3, 20, lambda case, cases=cases: cases.append(repr(case)))
    assert drawn[0] == drawn[1]
    assert pair("sd") is pair("sd")
