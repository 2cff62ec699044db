"""The census of mixing pipelines: what is counted, and that what is said to work is what the tests run."""

import json

import diffusers
import pytest

from tests.loops.__main__ import COUNTED
from tests.loops.census import LOOPS, SERVED, VARIANTS, mixes, pipelines, verdict
from tests.loops.table import TABLE, families


@pytest.fixture(scope="module")
def counted():
    return json.loads(COUNTED.read_text())


def test_every_mixing_pipeline_of_diffusers_is_counted(counted):
    """A diffusers with other pipelines asks for `python -m tests.loops`."""
    if f"diffusers {diffusers.__version__} " not in TABLE.read_text():
        pytest.skip(f"docs/families.md was made with another diffusers than {diffusers.__version__}")
    known = [name for name, found in pipelines() if mixes(found)]
    assert sorted([*counted["works"], *counted["refused"]]) == known
    assert counted["mixing"] == len(known)


def test_most_work_and_the_others_are_refused_with_a_reason(counted):
    assert len(counted["works"]) >= 120
    assert all("Expected" in reason and len(reason) > 40 for reason in counted["refused"].values())


def test_what_works_is_run_by_the_tests(counted):
    """Each has a tiny pipeline, which `test_every_loop` or the contract of the first seven families runs."""
    assert set(counted["works"]) <= {*(name for name, loop in LOOPS.items() if loop.guided), *SERVED, *VARIANTS}


@pytest.mark.parametrize("name", ["ChromaPipeline", "AudioLDM2Pipeline", "StableCascadeDecoderPipeline"])
def test_a_verdict_is_what_the_file_says(counted, name):
    assert verdict(name).removeprefix("refused: ") == counted["refused"].get(name, "works")


@pytest.mark.parametrize(
    ("name", "mixing"),
    [
        ("StableDiffusionPipeline", True),
        ("StableCascadePriorPipeline", True),  # by lerp
        ("Kandinsky3Pipeline", True),  # by two weights
        ("LTX2Pipeline", True),  # by scale - 1
        ("StableDiffusionPAGPipeline", False),  # three predictions
        ("StableDiffusionInstructPix2PixPipeline", False),
        ("Flux2Pipeline", False),  # one
        ("DDPMPipeline", False),
    ],
)
def test_what_mixes_two_predictions(name, mixing):
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    assert mixes(getattr(diffusers, name)) == mixing


def test_every_denoiser_of_a_loop_is_in_the_table():
    rows = [line.split("|")[1].strip() for line in TABLE.read_text().splitlines() if line.startswith("|")]
    assert {*families()} <= {*rows}
