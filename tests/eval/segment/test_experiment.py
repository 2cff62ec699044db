"""Experiments, and every TOML file of segmentation: it can be run, and the paper's table has a file for each cell."""

import tomllib
from pathlib import Path

import pytest
import torch

from eval.datasets.benchmarks import DATASETS, Benchmark, present
from eval.datasets.protocols import PROTOCOLS
from eval.segment.experiment import Experiment, images_of, method_of, rule_of, source_of
from eval.segment.methods import METHODS, BackgroundRule, labels_asked
from goca_guidance import CRF, TINY_SD, GoCAConfig
from tests.helpers.places import ROOT


FILES = [ROOT / "configs/demo.toml", *sorted((ROOT / "configs/segment").glob("*.toml"))]
PAPER = tomllib.loads((ROOT / "eval/paper.toml").read_text())
MODELS = dict(zip(("sd15", "sdxl", "pixart_sigma", "flux"), PAPER["models"].values(), strict=True))
UNETS = (TINY_SD, MODELS["sd15"], MODELS["sdxl"])
CAPTIONS = {  # released file of each benchmark
    "voc": "voc",
    "context": "context",
    "coco-object": "coco-object",
    "coco-stuff-27": "coco-stuff",
    "coco-stuff-171": "coco-stuff",
    "cityscapes": "city",
    "ade20k": "ade",
}


def test_a_grid_is_a_row_for_each_combination():
    grid = Experiment(grid={"heads": ["uniform", "contribution"], "rescale": [False, True]})
    assert list(grid.rows) == [f"heads {h}, rescale {r}" for h in ("uniform", "contribution") for r in (False, True)]
    both = method_of("heads uniform, rescale False", grid.rows["heads uniform, rescale False"]).config
    assert both == GoCAConfig(heads="uniform", rescale=False)


def test_the_background_is_the_methods_or_the_experiments_or_the_protocols():
    images = Benchmark("voc", ("background", "cat"), (), None)

    def rule(row=None, **experiment):
        return rule_of(Experiment({"goca": row or {}}, **experiment), method_of("goca", row or {}), images)

    own, others = {"kind": "constant", "values": [0.5]}, {"kind": "max", "values": [0.1], "merged": False}
    assert rule({"background": own}, background=others) == BackgroundRule("constant", (0.5,))
    assert rule(background=others) == BackgroundRule("max", (0.1,), merged=False)
    assert rule(protocol="goca") == BackgroundRule("offset", (0.2,), merged=True)
    standard = PROTOCOLS["standard"].background
    assert rule() == BackgroundRule(standard["kind"], tuple(standard["values"]), standard["merged"])
    mistakes = {
        "a background such as": {"merged": True},
        "`merged` to be": {**own, "merged": 1},
        "`more`": {**own, "more": 1},
    }
    for message, wrong in mistakes.items():
        with pytest.raises(ValueError, match=message):
            Experiment({"goca": {}}, background=wrong)


def test_words_of_the_background_come_from_the_benchmark_alone():
    experiment, asked = Experiment({"goca": {}}, benchmark="scenes-animals", split="validation"), 0
    images = images_of(experiment)
    for id in images.ids[:8]:
        image, mask = images.read(id)
        (prompt,) = source_of(experiment, images)(id, image, present(mask))
        assert [entity.words for entity in prompt.entities if entity.label is None] == [*images.words(id)]
        assert labels_asked([prompt]) == {*present(mask)} - {0}
        asked += len(labels_asked([prompt]))
    assert asked > 3
    for wrong in ({"words": 3}, {"word": 3}):
        with pytest.raises(ValueError, match="prompts of the source 'tags'"):
            source_of(Experiment({"goca": {}}, prompts={"source": "tags", **wrong}), images)


def test_a_grid_of_named_layers():
    names = ["mid_block", "up_blocks.0"]
    grid = Experiment(grid={"heads": ["uniform"], "layers": ["manual", names]})
    assert list(grid.rows) == ["heads uniform, layers manual", "heads uniform, layers mid_block + up_blocks.0"]
    assert [method_of(name, row).config.layers for name, row in grid.rows.items()] == ["manual", tuple(names)]


def test_constants_of_the_crf():
    assert [method_of("fttm", row).crf for row in ({}, {"crf": True}, {"crf": False})] == [CRF(), CRF(), None]
    assert method_of("goca", {}).crf is None
    assert method_of("goca", {"crf": {"theta_beta": 10}}).crf == CRF(theta_beta=10)
    for wrong, message in (
        ("yes", "`crf` to be True or False or a mapping"),
        ({"theta": 1}, "got `theta`: write `theta_beta`"),
        ({"w1": "a"}, "`w1` to be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            method_of("goca", {"crf": wrong})


def test_only_some_methods():
    both = Experiment(methods={"vanilla": {}, "goca": {}})
    assert list(both.only(["goca"]).rows) == ["goca"]
    with pytest.raises(ValueError, match="methods among"):
        both.only(["gocha"])


def test_an_unknown_benchmark_is_named():
    with pytest.raises(ValueError, match=r"a benchmark among voc, .*, but got 'vox'"):
        Experiment(methods={"goca": {}}, benchmark="vox")


# ---- files -----------------------------------------------------------------------------------------------------------
def has_background(experiment):
    return experiment.protocol == "goca" or experiment.benchmark in ("voc", "context", "coco-object", "scenes-animals")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def config(request):
    return request.param, Experiment.read(request.param)


def test_methods_are_known(config):
    _, experiment = config
    for name, settings in experiment.rows.items():
        assert settings.get("base", name) in METHODS
        assert method_of(name, settings)


def test_parts_go_together(config):
    _, experiment = config
    assert experiment.benchmark in DATASETS
    assert isinstance(getattr(torch, experiment.dtype), torch.dtype)
    drawn = DATASETS[experiment.benchmark].layout is None
    assert (experiment.root is None) == drawn == (experiment.model == TINY_SD)
    if experiment.prompts.get("source") == "captions":
        assert experiment.protocol == "goca"
        assert Path(experiment.prompts["path"]).stem == CAPTIONS[experiment.benchmark]
    if experiment.model not in UNETS:
        assert "diffcut" not in experiment.rows
        assert "diffsegmenter" not in experiment.rows


def test_background_is_decided(config):
    """Where there is a background, every method has one value, or somebody who chooses; nowhere else is a choice made."""
    _, experiment = config
    classes = ("background", "cat") if has_background(experiment) else ("cat",)
    images = Benchmark(experiment.benchmark, classes, (), None)
    rules = [rule_of(experiment, method_of(name, row), images) for name, row in experiment.rows.items()]
    several = any(rule and len(rule.values) > 1 for rule in rules)
    assert bool(experiment.tune) == (several and experiment.protocol != "goca")


def test_name_and_first_lines_say_what_it_is(config):
    path, experiment = config
    if experiment.root is None:
        return
    model, repository = next(item for item in MODELS.items() if f"_{item[0]}" in path.stem)
    kind = {"goca": ("", "_ablation"), "standard": ("_standard",)}[experiment.protocol]
    assert path.stem in [f"{experiment.benchmark.replace('-', '_')}_{model}{end}" for end in kind]
    assert experiment.model == repository
    about, command = path.read_text().splitlines()[:2]
    assert next(short for short, name in PAPER["models"].items() if name == repository) in about
    assert command == f"# python -m eval.segmentation {path.relative_to(ROOT)}"


@pytest.mark.parametrize("protocol", ["goca", "standard"])
def test_every_cell_of_the_papers_table_has_a_file(protocol):
    rows = {
        (name, experiment.model, experiment.benchmark)
        for experiment in map(Experiment.read, FILES)
        for name in experiment.rows
        if experiment.protocol == protocol
    }
    for number in PAPER["number"]:
        cell = number["method"], PAPER["models"].get(number["model"]), number["benchmark"]
        if number["protocol"] == "goca" and (protocol == "goca" or number["model"] == "SD1.5"):
            wanted = number["method"] in METHODS or (protocol == "goca" and number["model"] == "SD1.5")
            assert not wanted or cell in rows


def test_captions_of_the_paper_are_nine_offsets():
    for path in FILES:
        experiment = Experiment.read(path)
        if experiment.prompts.get("source") == "captions":
            assert experiment.background == {"kind": "offset", "values": [n / 10 for n in range(-4, 5)]}
