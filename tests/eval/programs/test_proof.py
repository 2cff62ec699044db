"""The proof: choices, rows, quality, what stays of an earlier result, and mistakes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from eval import proof
from eval.generation import checkpoint_quality
from eval.generation.checkpoint_quality import draw, judged_size
from eval.scenes import models
from eval.scenes.models import FOLDER, TrainedModel
from eval.segment import level_choices, level_defaults
from goca_guidance import TINY_SD


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(proof, "loaded", lambda folder, device=None: tiny)
    monkeypatch.setattr(level_choices, "TIMESTEPS", (50,))
    monkeypatch.setattr(level_choices, "IMAGES", 2)
    monkeypatch.setattr(level_choices, "OFFSETS", (0.0,))
    monkeypatch.setattr(level_choices, "_layers", lambda run, pipe, known: (list(known[6:8]), {}))


def content(path="results/proof.json"):
    return json.loads(Path(path).read_text())


def test_choices_then_rows_and_what_stays(tmp_path):
    arguments = ["--models", "tiny-sd", "--images", "2", "--levels", "plain", "unnamed"]
    with pytest.raises(ValueError, match=r"Expected choices for tiny-sd in results/choices.json, but got none: run"):
        proof.main(arguments)
    proof.main(["choices", "--models", "tiny-sd"])
    assert content("results/choices.json")["rows"][0]["timestep"] == 50
    proof.main(arguments)
    rows = content()["rows"]
    assert len(rows) == 2 * 6
    assert {"command", "commit", "versions", "quality"} <= set(content())
    absent = {**rows[0], "checkpoint": 16, "weights": "gone"}  # not there: it stays
    changed = {**rows[0], "level": "crowd", "weights": "other"}  # of other weights than those that are there
    Path("results/proof.json").write_text(json.dumps(content() | {"rows": [absent, changed, *rows]}))
    proof.main([*arguments[:-1]])
    assert content()["rows"] == [*rows, absent]
    shutil.copytree(TINY_SD, tmp_path / "checkpoints" / "tiny-sd" / "16")
    proof.main(arguments)
    assert [row["checkpoint"] for row in content()["rows"]] == [100] * 12 + [16] * 12
    assert absent not in content()["rows"]


def test_candidates_are_chosen_on_validation_and_confirmed_on_test(monkeypatch):
    monkeypatch.setattr(proof, "chosen", lambda model: {"timestep": 50})
    monkeypatch.setattr(level_defaults, "IMAGES", {"validation": 2, "test": 3})
    monkeypatch.setattr(level_defaults, "LEVELS", ("plain",))
    names = {"CRF of 10 grey levels (ours)", "refined 0 times"}
    monkeypatch.setattr(
        level_defaults, "CANDIDATES", {name: each for name, each in level_defaults.CANDIDATES.items() if name in names}
    )
    proof.main(["defaults", "--models", "tiny-sd"])
    rows = content("results/defaults.json")["rows"]
    validation = [row for row in rows if row["split"] == "validation"]
    assert [row["method"] for row in validation] == list(level_defaults.CANDIDATES)
    assert {(row["images"], row["base"]) for row in validation} == {(2, "all")}
    ahead = {(row["level"], row["method"]) for row in validation if row["difference"] > 0}
    tested = [row for row in rows if row["split"] == "test"]
    assert {(row["level"], row["method"]) for row in tested} == ahead
    assert all(row["images"] == 3 and row["low"] <= row["difference"] <= row["high"] for row in tested)
    proof.main(["defaults", "--models", "tiny-sd"])
    assert content("results/defaults.json")["rows"] == rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "huge"], "Expected models among tiny-sd, tiny-unet, tiny-pixart, tiny-flux, but got 'huge'"),
        (
            ["--models", "tiny-sd", "--checkpoints", "25"],
            "Expected the weights of tiny-sd at 25 %, but they are not there",
        ),
        (["--models", "tiny-sd", "--levels", "hard"], "Expected levels among"),
    ],
)
def test_mistakes_are_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr(
        proof, "chosen", lambda model: {"timestep": 50, "layers": ["up_blocks.1"], "offsets": {}, "preset_heads": ""}
    )
    with pytest.raises(ValueError, match=message) as caught:
        proof.main(arguments)
    assert "\n" not in str(caught.value)
    assert not Path("results").exists()


def test_choices_of_other_weights_are_refused():
    Path("results").mkdir()
    Path("results/choices.json").write_text('{"rows": [{"model": "tiny-sd", "weights": "other"}]}')
    with pytest.raises(ValueError, match="but got those of other weights"):
        proof.chosen("tiny-sd")
    Path("results/choices.json").write_text('{"rows": ')
    with pytest.raises(ValueError, match=r"Expected a result of eval.proof in results/choices.json, but got"):
        proof.chosen("tiny-sd")


class FakeJudges:
    def __init__(self, state):
        pass

    def __call__(self, drawing):
        return {"objects_shown": np.mean([np.asarray(picture) for picture in drawing.pictures()]).item()}


def test_quality_is_gathered_and_pictures_are_drawn_once(monkeypatch, tmp_path):
    """Loss and judges' numbers stand in one row."""
    folder, drawn = tmp_path / "unet", []
    shutil.copytree(FOLDER / "tiny-unet", folder)
    monkeypatch.setitem(models.MODELS, "tiny-unet", TrainedModel(folder, 64, (64,)))
    monkeypatch.setattr(checkpoint_quality, "BATCH", 2)
    monkeypatch.setattr(checkpoint_quality, "HELD_OUT", 8)
    monkeypatch.setattr(proof, "Judges", FakeJudges)
    monkeypatch.setattr(proof, "draw", lambda *job: drawn.append(job) or draw(*job))
    asked = ["--models", "tiny-unet", "--images", "3"]
    proof.main(["pictures", *asked])
    proof.main(["loss", *asked])
    assert content()["rows"] == []
    (row,) = content()["quality"]
    assert (row["model"], row["checkpoint"], row["captions"]) == ("tiny-unet", 100, 3)
    assert 0 < row["objects_shown"] < 255
    assert 0.02 < row["loss"] < 0.5
    assert len(drawn) == 2
    proof.main(["pictures", *asked])
    assert len(drawn) == 2
    assert content()["quality"] == [row]


def test_a_large_picture_is_judged_by_its_mean():
    picture = np.zeros((128, 128, 3), np.uint8)
    picture[::2] = 200
    assert (np.asarray(judged_size(picture)) == 100).all()
