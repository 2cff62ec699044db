"""Methods on levels: one forward for several, counts that are kept, rows with intervals, choices, tables and the figure."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.sparse import csr_array

from eval.scenes.levels import LEVELS, question
from eval.segment import level_counts
from eval.segment.confusion import Counts, mean_iou, total
from eval.segment.level_choices import PARTS, choose, methods_of
from eval.segment.level_counts import LevelMethod, LevelRun, measure
from eval.segment.level_rows import bootstrap, means, rows_of
from eval.segment.power import by_candidate, by_checkpoint, by_level, by_timestep, power
from eval.segment.together import labelled, segment_together
from goca_guidance import TINY_SD, Background, GoCAConfig


FOLDER = Path(TINY_SD)
MANUAL = GoCAConfig.vanilla(layers=("up_blocks.1",))
METHODS = {name: LevelMethod(config) for name, config in {**PARTS, "manual": MANUAL}.items()}
SOME = {name: METHODS[name] for name in ("vanilla", "all")}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setattr(level_counts, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(level_counts, "CHUNK", 2)


def run(level="plain", methods=SOME, images=4, **settings):
    return LevelRun("tiny-sd", FOLDER, level, methods, images=images, timestep=50, **settings)


def measured(a_run, pipe):
    for chunk in a_run.chunks:
        measure(a_run, pipe, chunk)
    return a_run


def test_a_shared_forward_gives_what_each_gives_alone(tiny):
    """Also a configuration that shares nothing, images of different numbers of classes, and background words."""
    asked, words = [question(LEVELS["unnamed"], "test", index) for index in (0, 1)], ("sky", "grass")
    configs, classes = [*PARTS.values(), MANUAL, GoCAConfig(row_normalise=False)], LEVELS["unnamed"].classes
    given = {"height": 64, "width": 64, "timestep": 50}
    pictures, names = [each.image for each in asked], [each.names for each in asked]
    found = segment_together(tiny, pictures, names, configs, words, **given)
    for config in configs:
        alone = tiny.segment(pictures, names, goca=config, background=Background(words, offset=-0.1), **given)
        assert torch.allclose(found[config].scores, alone.scores, atol=1e-4)
        assert torch.allclose(found[config].entities, alone.entities, atol=1e-4)
        both = zip(labelled(found[config], classes, -0.1), alone.label_maps, alone.classes, strict=True)
        for ours, theirs, each in both:
            right = np.array([classes.index(name) for name in each])[theirs]
            assert (ours.numpy() == right).mean() > 0.999


def test_counts_are_those_of_the_masks(tiny):
    """A picture of its own through the public door, counted by hand."""
    a_run = measured(run(images=1, methods={"all": METHODS["all"]}), tiny)
    asked = question(LEVELS["plain"], "test", 0)
    generator = [torch.Generator().manual_seed(level_counts.seed_of(0, "test 0"))]
    labels = tiny.segment(asked.image, asked.names, goca=PARTS["all"], timestep=50, generator=generator).label_maps[0]
    classes = LEVELS["plain"].classes
    found = np.array([classes.index(name) for name in asked.names])[labels]
    hits = (found == asked.mask).sum()
    assert np.trace(total(a_run.counts("all"), 1, 24)[0]) == hits


def test_a_level_and_its_interior_share_a_forward(tiny, monkeypatch):
    plain = measured(run(), tiny)
    monkeypatch.setattr(level_counts, "segment_together", None)
    inside = measured(run("interior"), tiny)
    assert all(inside.path("all", chunk) == plain.path("all", chunk) for chunk in plain.chunks)
    sums = [total(plain.counts("all"), 2, 24)[value].sum() for value in (0, 1)]
    assert sums[0] == 4 * 64 * 64 > sums[1] > 0
    rows = [rows_of(each, 100)[1] for each in (plain, inside)]
    assert rows[1]["miou"] > rows[0]["miou"]


def test_a_killed_run_goes_on_and_others_methods_are_not_measured_again(tiny, monkeypatch):
    a_run, saved, save = run(methods={"vanilla": METHODS["vanilla"]}), [], Counts.save

    def killed(self, path):
        if saved:
            raise KeyboardInterrupt
        saved.append(path)
        save(self, path)

    monkeypatch.setattr(Counts, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        measured(a_run, tiny)
    monkeypatch.setattr(Counts, "save", save)
    assert [a_run.missing(chunk) for chunk in a_run.chunks] == [[], ["vanilla"]]
    first = saved[0].stat().st_mtime_ns
    both = measured(run(), tiny)
    assert saved[0].stat().st_mtime_ns == first
    assert rows_of(both, 100)[0] == rows_of(measured(a_run, tiny), 100)[0]
    saved[0].write_bytes(b"half")
    assert both.missing(both.chunks[0]) == ["vanilla"]


def test_what_a_model_does_not_know_is_refused():
    with pytest.raises(ValueError, match=r"Expected levels among plain, .*, but got 'hard'"):
        run("hard")
    with pytest.raises(
        ValueError, match="levels that tiny-flux knows, but got 'fine', whose pictures have 256 pixels"
    ):
        LevelRun("tiny-flux", FOLDER, "fine", SOME)


def test_a_short_text_is_asked_in_several_prompts(tiny):
    """Every second name each; the pixels' classes are among all names, and the scores those of the prompts."""
    a_run = measured(run("vocabulary", images=1, methods={"all": METHODS["all"]}), tiny)
    assert a_run.prompts == 2
    asked = question(LEVELS["vocabulary"], "test", 0)
    scores = []
    for names in (asked.names[::2], asked.names[1::2]):
        generator = [torch.Generator().manual_seed(level_counts.seed_of(0, "test 0"))]
        scores.append(tiny.segment(asked.image, names, goca=PARTS["all"], timestep=50, generator=generator).scores)
    first = torch.nn.functional.interpolate(torch.cat(scores, 1), (64, 64), mode="bilinear").argmax(1)[0]
    classes = [LEVELS["vocabulary"].classes.index(name) for name in (*asked.names[::2], *asked.names[1::2])]
    hits = (np.array(classes)[first] == asked.mask).sum()
    assert abs(np.trace(total(a_run.counts("all"), 1, 24)[0]) - hits) <= 4


# ---- numbers ---------------------------------------------------------------------------------------------------------
def test_objects_and_grounds_apart():
    """By hand: object 0 half right (its other half taken for ground 16), ground 16 then of 3 pixels 2 right."""
    confusion = np.zeros((24, 24), int)
    confusion[0, 0], confusion[0, 16], confusion[16, 16] = 1, 1, 2
    assert means(confusion).tolist() == pytest.approx([(1 / 2 + 2 / 3) / 2, 1 / 2, 2 / 3])
    assert means(confusion)[0] == mean_iou(confusion)


def test_intervals_are_paired():
    """Images that differ much, a method that is better by as much on each: the interval is about that."""
    rng = np.random.default_rng(0)
    wrong = rng.integers(20, 60, 40)
    rows = []
    for errors in (wrong - 5, wrong):
        matrices = np.zeros((40, 24, 24), int)
        matrices[:, 0, 0], matrices[:, 0, 16] = 100 - errors, errors
        matrices[:, 16, 16] = 100
        rows.append(csr_array(matrices.reshape(40, -1)))
    low, high = bootstrap(*rows)
    assert 0.04 < low[1] < 0.05 < high[1] < 0.06
    assert (low > 0).all()
    assert not np.any(bootstrap(rows[1], rows[1]))


def test_rows_have_what_the_result_promises(tiny):
    first, second = rows_of(measured(run(), tiny), 50)
    assert "difference" not in first
    assert {"model", "checkpoint", "level", "method", "images", "miou", "objects", "grounds", "weights"} <= set(first)
    assert second["difference"] == pytest.approx(second["miou"] - first["miou"], abs=2e-4)
    assert second["low"] <= second["difference"] <= second["high"]
    assert (second["checkpoint"], second["images"]) == (50, 4)


def test_choices(tiny, monkeypatch):
    """Those that were best of what was tried, and the rows take them."""
    monkeypatch.setattr("eval.segment.level_choices.TIMESTEPS", (50, 900))
    found = choose("tiny-sd", FOLDER, tiny, images=2)
    tried = found["tried"]
    assert found["timestep"] == 50
    assert set(tried["timestep"]) == {"50", "900"}
    assert tried["layers"][max(tried["layers"], key=tried["layers"].get)] == max(tried["layers"].values())
    assert set(found["layers"]) == set(max(tried["layers"], key=tried["layers"].get).split(" + "))
    rows = methods_of(found)
    assert rows["manual"].config == GoCAConfig.vanilla(layers=tuple(found["layers"]))
    for name, values in tried["offset"].items():
        assert values[str(rows[name].offset)] == max(values.values())
    assert "all, uniform heads" in methods_of(found | {"preset_heads": "uniform"})


# ---- what is shown ---------------------------------------------------------------------------------------------------
def rows_of_two():
    rows = []
    for share, lead in ((50, 0.01), (100, 0.03)):
        for level in ("plain", "crowd"):
            place = {"model": "tiny-sd", "checkpoint": share, "level": level, "images": 4, "weights": "0"}
            rows.append({**place, "method": "vanilla", "miou": 0.5, "objects": 0.4, "grounds": 0.6})
            rows.append({**place, "method": "all", "miou": 0.5 + lead, "objects": 0.4, "grounds": 0.6,
                         "difference": lead, "low": lead / 2, "high": 2 * lead})  # fmt: skip
    return rows


def test_tables(tmp_path):
    table = by_level(rows_of_two(), ["tiny-sd"]).splitlines()
    assert table[0] == "| level | vanilla | all |"
    assert table[2] == "| plain | 0.500 | 0.530<br>+0.030 (+0.015 to +0.060) |"
    assert "+0.010" in by_level(rows_of_two(), ["tiny-sd", "miou", "50"])
    assert by_level(rows_of_two(), ["tiny-flux"]) == "tiny-flux was not measured."
    quality = [{"model": "tiny-sd", "checkpoint": 100, "captions": 4, "scale": 5.0, "weights": "0", "loss": 0.8}]
    lines = by_checkpoint([*rows_of_two(), {**rows_of_two()[0], "level": "fine"}], quality).splitlines()
    assert lines[0] == "| model | checkpoint | vanilla | GoCA | lead | loss |"
    assert lines[2] == "| tiny-sd | 100 | 0.5 | 0.53 | 0.03 | 0.8 |"
    assert lines[3] == "| tiny-sd | 50 | 0.5 | 0.51 | 0.01 |  |"
    tried = {"timestep": {"50": {"vanilla": 0.5, "all": 0.6}}}
    line = by_timestep([{"model": "tiny-sd", "timestep": 50, "tried": tried}]).splitlines()[-1]
    assert line == "| tiny-sd | 0.500 / 0.600 | 50 |"
    drawn = [{"model": "tiny-sd", "checkpoint": share, "mmd_efficientnet_lite0": 1 / share} for share in (50, 100)]
    for name, known in {"with.png": drawn, "without.png": []}.items():
        power({"rows": rows_of_two(), "quality": known}, tmp_path / name)
        assert Image.open(tmp_path / name).width > 300


def test_candidates_by_model_validation_above_test():
    facts = {"level": "plain", "method": "CRF", "base": "all", "low": 0.01, "high": 0.03}
    rows = [
        {**facts, "model": "tiny-sd", "split": "validation", "difference": 0.03},
        {**facts, "model": "tiny-sd", "split": "test", "difference": 0.02},
        {**facts, "model": "tiny-flux", "split": "validation", "difference": -0.01},
        {**facts, "model": "tiny-sd", "split": "validation", "difference": 0.5, "level": "crowd"},
    ]
    assert by_candidate(rows).splitlines() == [
        "| candidate | base | tiny-sd | tiny-flux |",
        "| --- | --- | --- | --- |",
        "| CRF | all | +0.030<br>+0.020 (+0.010 to +0.030) | -0.010 |",
    ]
