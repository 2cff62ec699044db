"""The fair comparison of guidance: drawn and judged cell by cell, gone on with after a kill, and what is written."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from eval import guidance
from eval.generation.drawing import METHODS, Drawing
from eval.generation.outcomes import Cell, Kept


ASKED = ["--model", "tiny-sd", "--images", "2", "--steps", "2", "--device", "cpu"]
CELLS = [Cell("noise", "cfg", 3.0), Cell("noise", "goca", 3.0), Cell("scene", "layout", 5.0)]


class Says:
    """A judge that says the same of every picture."""

    def __init__(self, vae, scenes, device):
        pass

    def __call__(self, pictures, scenes):
        assert (len(pictures), pictures.min() >= 0, pictures.max() <= 1) == (2, True, True)
        one = np.ones(len(pictures), int)
        names = ("named", "shown", "others", "ground", "texture", "layout")
        return dict.fromkeys(names, one) | {"distance": np.zeros(1001)}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(guidance, "Judge", Says)
    monkeypatch.setattr(guidance, "cells", lambda: CELLS)
    monkeypatch.setattr(guidance, "REFERENCE", 2)
    monkeypatch.setattr(guidance, "file_digest", lambda path: "0" * 16)
    return tmp_path


def test_it_goes_on_where_it_was_killed_and_is_written(here, monkeypatch):
    drawn, draw = [], Drawing.__call__

    def killed(self, method, scale, start="noise"):
        drawn.append((start, scale))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(self, method, scale, start)

    monkeypatch.setattr(Drawing, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        guidance.main(ASKED)
    path = here / "runs" / "guidance" / "tiny-sd-100.npz"
    assert Kept(path).cells() == CELLS[:2]
    guidance.main(ASKED)
    assert drawn == [("noise", 3.0), ("noise", 3.0), ("scene", 5.0), ("scene", 5.0)]
    with pytest.raises(ValueError, match="move the file away"):
        guidance.main([*ASKED, "--batch", "1"])
    guidance.main([])
    result = json.loads((here / "results" / "guidance.json").read_text())
    assert result["settings"][0]["model"] == "tiny-sd"
    assert {(row["start"], row["method"]) for row in result["rows"]} == {
        ("", "scenes"), ("noise", "cfg"), ("noise", "goca"), ("scene", "layout"),
    }  # fmt: skip
    fields = {"model", "checkpoint", "level", "method", "scale", "images", "difference", "low", "high"}
    assert fields <= {*next(row for row in result["rows"] if row["method"] == "goca")}
    for name in ("guidance.png", "guidance-tiny-sd.png"):
        assert Image.open(here / "docs" / name).width > 500


def test_a_cell_that_fails_is_left_for_the_next_start(here, monkeypatch):
    def broken(self, method, scale, start="noise"):
        if start == "scene":
            raise RuntimeError("out of memory")
        return torch.full((2, 3, 64, 64), 0.5), {}

    monkeypatch.setattr(Drawing, "__call__", broken)
    monkeypatch.setattr(guidance, "draw_pairs", lambda *args: None)
    with pytest.raises(RuntimeError, match="scene/layout/5 failed; the last one: out of memory"):
        guidance.main(ASKED)
    assert Kept(here / "runs" / "guidance" / "tiny-sd-100.npz").cells() == CELLS[:2]


def test_what_is_not_there(here):
    with pytest.raises(ValueError, match="name a --model"):
        guidance.main([])
    with pytest.raises(ValueError, match=r"tiny-flux at 6 %.*not there"):
        guidance.main(["--model", "tiny-flux", "--checkpoint", "6"])


def test_every_method_is_measured_and_cfg_beside_each():
    cells = guidance.cells()
    assert {cell.method for cell in cells} == {*METHODS}
    assert {Cell(cell.start, "cfg", cell.scale) for cell in cells} <= {*cells}
    assert not [cell for cell in cells if cell.start == "noise" and METHODS[cell.method].layout]
    first = cells[: len(cells) // 2]
    assert {cell.method for cell in first} == {*METHODS}
