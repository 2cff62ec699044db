"""What is kept of cells, and the rows that are made of it, by hand."""

import json

import numpy as np
import pytest

from eval.generation.outcomes import LEVELS, Cell, Kept, at, rows_of, scenes_rows


SETTINGS = {"model": "tiny-sd", "checkpoint": 100, "images": 4, "command": "python -m eval.guidance --model tiny-sd"}
ARRAYS = {
    "named": np.array([2, 2, 3, 3]),
    "others": np.array([0, 1, 0, 0]),
    "ground": np.array([True, True, True, False]),
    "texture": np.array([1.0, 4.0, np.nan, 2.0]),
    "layout": np.array([0.5, 0.5, 0.5, 0.7]),
}


def arrays(shown, distance=0.1, **others):
    return {**ARRAYS, "shown": np.array(shown), "distance": np.full(1001, distance), **others}


def kept_of(path, **cells):
    kept = Kept(path, SETTINGS)
    for name, found in cells.items():
        kept.add(name, found)
    return kept


@pytest.fixture
def kept(tmp_path):
    return kept_of(
        tmp_path / "runs" / "tiny-sd-100.npz",
        **{
            "noise/cfg/3": arrays([1, 1, 2, 2], 0.1),
            "noise/cfg/5": arrays([2, 1, 3, 2], 0.3),
            "noise/goca/3": arrays([2, 1, 2, 2], 0.15, mean_rate=np.array([1.25, 1.25, 1.0, 1.5])),
            "scene/layout/3": arrays([2, 2, 3, 3], mean_rate=np.ones(4)),
            "scenes": arrays([2, 2, 3, 3], 0.0),
            "pairs": {"told": json.dumps({"captions": ["a cat"]})},
        },
    )


def test_rows_by_hand(kept):
    rows = {(row["start"], row["method"], row["scale"], row["level"]): row for row in rows_of(kept)}
    plain = rows["noise", "cfg", 3.0, "objects shown"]
    assert plain["value"] == pytest.approx(6 / 10)
    assert "difference" not in plain
    found = rows["noise", "goca", 3.0, "objects shown"]
    assert (found["model"], found["checkpoint"], found["images"], found["mean_rate"]) == ("tiny-sd", 100, 4, 1.25)
    assert (found["value"], found["difference"]) == pytest.approx((0.7, 0.1))
    assert found["low"] <= 0 <= found["high"]
    assert found["difference_equal_mean"] == pytest.approx(0.7 - (0.6 * 1.25 + 0.8 * 0.75) / 2, abs=1e-5)  # at 3.75
    assert rows["noise", "goca", 3.0, "ground texture"]["value"] == pytest.approx(2)  # of 1, 4 and 2
    assert rows["noise", "goca", 3.0, "ground texture"]["difference"] == 0
    assert rows["noise", "goca", 3.0, "distance"]["difference_equal_mean"] == pytest.approx(0.15 - 0.175)
    assert rows["noise", "goca", 3.0, "other objects"]["value"] == 0.25
    assert ("noise", "goca", 3.0, "layout") not in rows
    layout = rows["scene", "layout", 3.0, "layout"]
    assert layout["value"] == pytest.approx(0.55)
    assert "difference" not in layout  # nothing was begun from scenes under plain guidance
    assert {row["level"]: row["value"] for row in scenes_rows(kept)}["objects shown"] == 1
    assert {row["level"] for row in rows.values()} == {*LEVELS}


def test_it_is_read_again_and_other_settings_are_refused(kept):
    again = Kept(kept.path, {**SETTINGS, "command": "another"})
    assert again.cells() == kept.cells()
    assert Cell("noise", "goca", 3.0) in again.cells()
    assert len(again.cells()) == 4
    assert str(again.of("pairs")["told"]) == json.dumps({"captions": ["a cat"]})
    with pytest.raises(ValueError, match=r"'images': 5.*'images': 4.*move the file away"):
        Kept(kept.path, {**SETTINGS, "images": 5})
    kept.path.write_bytes(kept.path.read_bytes()[:100])
    with pytest.raises(ValueError, match="Expected measurements"):
        Kept(kept.path)


def test_between_two_scales():
    curve = {2.0: (1.0, np.array([0.0, 2.0])), 4.0: (3.0, np.array([4.0, 4.0]))}
    value, draws = at(curve, 2.5)
    assert (value, draws.tolist()) == (1.5, [1.0, 2.5])
    assert at(curve, 4.0)[0] == 3
    assert at(curve, 4.1) is None
    assert at({}, 4.1) is None
