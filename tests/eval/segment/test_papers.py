"""Our numbers beside the papers': only what was measured under the same conditions is compared."""

import tomllib

import pytest

from eval.common.files import write_json
from eval.datasets.benchmarks import DATASETS
from eval.segment.experiment import Experiment
from eval.segment.methods import METHODS
from eval.segment.papers import PAPER, beside_papers


MAIN_TABLE = """
vanilla SD1.5        44.3 32.3 32.3 11.8 18.0
vanilla Flux         55.7 48.4 43.3 25.6 24.5
fttm    SD1.5        48.9 30.0 34.6 12.3 20.3
goca    SD1.5        60.7 40.4 39.2 16.1 22.0
goca    SDXL         65.6 42.3 44.3 21.2 23.2
goca    PixArt-Sigma 63.6 43.2 39.8 22.6 23.8
goca    Flux         70.7 51.1 48.1 27.1 29.3
"""
ROW = {"method": "goca", "model": "stable-diffusion-v1-5", "benchmark": "voc", "protocol": "goca", "prompts": "captions",
       "split": "train", "images": 1462, "skipped": 2, "miou": 0.5448}  # fmt: skip


def cells(folder, **changes):
    """The cells of GoCA's own row of SD1.5, by benchmark, where our result has one row."""
    write_json(folder / "segment-x.json", {"rows": [ROW | changes]})
    head, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in beside_papers(folder).splitlines())
    (found,) = [line for line in lines if line[:4] == ["SD1.5", "goca", "goca", "GoCA's paper"]]
    return dict(zip(head, found, strict=True))


def test_ours_beside_theirs(tmp_path):
    found = cells(tmp_path)
    assert (found["voc"], found["context"], found["context-59"]) == ("54.5 / 60.7", "– / 40.4", "")


@pytest.mark.parametrize(
    "other",
    [
        {"images": 20},
        {"split": "val"},
        {"prompts": "tags"},
        {"protocol": "standard"},
        {"model": "tiny-sd"},
        {"method": "x"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_other_conditions_are_not_compared(tmp_path, other):
    assert cells(tmp_path, **other)["voc"] == "– / 60.7"


def test_results_of_another_form_are_named(tmp_path):
    write_json(tmp_path / "segment-old.json", {"rows": [{"method": "goca", "mIoU": 71.2}]})
    with pytest.raises(ValueError, match=r"segment-old\.json"):
        beside_papers(tmp_path)


def test_the_papers_numbers():
    paper = tomllib.loads(PAPER.read_text())
    known = {*METHODS, *Experiment.read(PAPER.parents[1] / "configs/segment/voc_sd15_ablation.toml").rows}
    keys = [(n["method"], n["model"], n["benchmark"], n["source"]) for n in paper["number"]]
    assert len(set(keys)) == len(keys)
    for number in paper["number"]:
        assert 0 < number["miou"] < 1
        assert number["method"] in known
        assert number["benchmark"] in DATASETS
        assert number["protocol"] in paper["protocols"]
        assert number["protocol"] != "goca" or number["model"] in paper["models"]
    found = {key: n["miou"] for key, n in zip(keys, paper["number"], strict=True)}
    for method, model, *values in map(str.split, MAIN_TABLE.strip().splitlines()):
        for benchmark, value in zip(("voc", "context", "coco-object", "cityscapes", "ade20k"), values, strict=True):
            assert found[method, model, benchmark, "GoCA's paper"] == pytest.approx(float(value) / 100)
