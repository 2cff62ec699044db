"""The program that measures all on a GPU, here on a CPU and in this process."""

import json

import pytest
import torch

from eval import speed_gpu
from eval.cost import kernel_facts, on_card
from tests.helpers.interpreted import interpreted


@pytest.fixture
def ran(monkeypatch):
    """Names of the functions that were given a process of their own."""
    calls = []

    def here(function, *args, seconds):
        assert seconds > 0
        calls.append(function.__name__)
        return function(*args)

    monkeypatch.setattr(speed_gpu, "alone", here)
    return calls


def arguments(folder, *more):
    files = "--result", str(folder / "speed.json"), "--answers", str(folder / "answers.json")
    return [*"--device cpu --families tiny-sd --batch 1 --seconds 0.1".split(), *files, *more]


def test_a_tiny_case_is_measured_once_and_kept(ran, tmp_path, capsys):
    speed_gpu.main(arguments(tmp_path, "--parts", "questions", "ratios"))
    first = (tmp_path / "speed.json").read_bytes()
    rows = json.loads(first)["rows"]
    assert [(row["family"], row["batch"], row["kernels"], row["lse"]) for row in rows] == [
        ("tiny-sd", 1, "off", "off"), ("tiny-sd", 1, "off", "on")
    ]  # fmt: skip
    assert all("CPU" in row["device"] and row["guided_ms"] > row["stock_ms"] > 0 for row in rows)
    told = capsys.readouterr().out
    assert "Not measured:\nerrors: they need a CUDA device, and this is cpu" in told
    assert not (tmp_path / "answers.json").exists()
    asked = len(ran)
    speed_gpu.main(arguments(tmp_path, "--parts", "ratios"))
    assert len(ran) == asked
    assert (tmp_path / "speed.json").read_bytes() == first


def test_what_there_was_no_time_for_is_told(ran, tmp_path, capsys):
    speed_gpu.main(arguments(tmp_path, "--minutes", "0.01"))
    assert ran == []
    assert (
        "tiny-sd, batch 1: no time was left\ntiny-sd, batch 1, compiled: no time was left" in capsys.readouterr().out
    )


def test_a_case_that_fails_leaves_the_others(monkeypatch, tmp_path, capsys):
    def failing(function, case, *args, seconds):
        if case.batch == 1:
            raise torch.OutOfMemoryError("full")
        return [{"kernels": "off", "lse": "off", **speed_gpu._key(case, "cpu", False)}]

    monkeypatch.setattr(speed_gpu, "alone", failing)
    speed_gpu.main([*arguments(tmp_path, "--parts", "ratios"), "--batch", "1", "2"])
    assert [row["batch"] for row in json.loads((tmp_path / "speed.json").read_text())["rows"]] == [2]
    assert "tiny-sd, batch 1: full" in capsys.readouterr().out


def test_kernels_are_asked_of():
    """In the interpreter, on one small layer."""
    pytest.importorskip("triton")
    shape = kernel_facts.Shape("a layer", 2, 16, 4, text=16)
    with interpreted():
        (errors,) = kernel_facts.errors("cpu", [shape], ["float32"])
        as_it_is, tile = kernel_facts.tiles("cpu", [shape], [(16, 16, 4, 2)], repeats=1)
        calls = kernel_facts.host_time("cpu", shape, repeats=5)
    assert errors.pop("case") == "a layer, 4 x 4, 2 heads of 16, float32"
    assert errors.keys() == {"log_sum_exp", "agreement", "sum", "words"}
    assert all(error < 1e-5 for error in errors.values())
    assert as_it_is["ms"] > 0
    assert (tile["warps"], tile["stages"], "error" in tile) == (4, 2, False)
    assert all(call["microseconds"] > 0 for call in calls)


def test_a_wrong_kernel_is_seen(monkeypatch):
    shape, right = kernel_facts.Shape("a layer", 2, 16, 4), kernel_facts.kernels.log_sum_exp
    monkeypatch.setattr(kernel_facts.kernels, "log_sum_exp", lambda record: right(record) + 0.01)
    pytest.importorskip("triton")
    with interpreted():
        (errors,) = kernel_facts.errors("cpu", [shape], ["float32"])
    assert min(errors["log_sum_exp"], errors["sum"]) > 1e-3


def test_the_stock_calls_are_asked_of():
    found = on_card.statistics_of_stock("cpu", [kernel_facts.Shape("a layer", 2, 16, 4)])
    assert [row["case"].rpartition(", ")[2] for row in found] == ["stock", *on_card.BACKENDS]
    assert all("ms" in row or "error" in row for row in found)


def test_a_layer_of_each_grid_is_asked_of():
    grids = on_card.small_maps("cpu", "tiny-sd", "float32")
    assert [row["case"].split(",")[1] for row in grids] == [" 4 x 4", " 8 x 8", " 16 x 16"]
    assert all(row["pytorch_ms"] > 0 and row["kernels_ms"] > 0 for row in grids)


def test_what_cannot_be_done_here_is_told():
    assert on_card._tried("a graph", lambda: 1 // 0) == {
        "case": "a graph", "error": "ZeroDivisionError: integer division or modulo by zero"
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="CUDA"):
        on_card.ask("errors", "cpu")
