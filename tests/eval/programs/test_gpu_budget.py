"""The program that counts what regions add on a GPU."""

import json
from dataclasses import replace

import pytest

from eval import gpu_budget
from eval.cost.budget import Cost
from eval.cost.cases import CASES
from eval.cost.fake_step import Counts, Step


@pytest.fixture
def counted(monkeypatch):
    """Calls of `cost`, which is answered at once."""
    calls, step = [], Step(Counts(7, 2 * 10**9), {"method.maps:min_max:42": Counts(5, 3 * 10**9, 2**21)}, [], 2**20)
    step.held["method.maps:min_max:42"] = 2**19

    def cost(case, batch, with_kernels):
        calls.append((case, batch, with_kernels))
        return Cost(step, step, replace(step, peak=3 * 2**20))

    monkeypatch.setattr(gpu_budget, "cost", cost)
    return calls


def test_a_row_is_counted_once_and_kept(counted, tmp_path, capsys):
    result = tmp_path / "gpu-budget.json"
    arguments = ["sdxl, 1024 px", "--batch", "4", "--result", str(result)]
    gpu_budget.main(arguments)
    first = result.read_bytes()
    off, on = json.loads(first)["rows"]
    assert (off["family"], off["batch"], off["kernels"], on["kernels"]) == ("sdxl, 1024 px", 4, "off", "on")
    assert (off["added_launches"], off["added_gb"], off["added_peak_mb"]) == (5, 3.0, 2)
    gpu_budget.main(arguments)
    assert counted == [(CASES["sdxl, 1024 px"], 4, False), (CASES["sdxl, 1024 px"], 4, True)]
    assert result.read_bytes() == first
    assert "| sdxl, 1024 px | 4 | on | 7 | 5 | 2.0 | 3.0 | 1 | 2 | 2 |" in capsys.readouterr().out


def test_lines_of_code_are_shown(counted, tmp_path, capsys):
    gpu_budget.main(["sdxl, 1024 px", "--batch", "4", "--lines", "3", "--result", str(tmp_path / "a.json")])
    shown = capsys.readouterr().out
    assert "| method.maps:min_max:42 | 5 | 3.0 |" in shown
    assert "| method.maps:min_max:42 | 0.5 |" in shown


def test_a_case_that_does_not_exist_is_named(capsys):
    with pytest.raises(SystemExit):
        gpu_budget.main(["sd-3"])
    assert "but got sd-3" in capsys.readouterr().err
