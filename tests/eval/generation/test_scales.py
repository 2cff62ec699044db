"""Metrics over guidance scales: the table and the trade-off curves."""

import pytest

from eval.generation import scales
from eval.generation.scales import by_scale, trade_off


def row(method, scale, distance, accuracy, gap=None, **more):
    found = {"method": method, "model": "tiny-sd", "guidance_scale": scale, "warnings": []}
    for name, value in (("fid", distance), ("clip_score", accuracy)):
        found |= {name: value, f"{name}_interval": [value - 1, value + 1]}
        if gap is not None:
            found |= {f"{name}_difference": gap, f"{name}_difference_interval": [gap - 0.5, gap + 0.5]}
            found |= {f"{name}_within_noise": abs(gap) <= 0.5}
    return found | more


ROWS = [
    row("cfg", 7.5, 20.0, 31.5),
    row("goca", 7.5, 19.0, 31.75, gap=-1.0),
    row("cfg", 2.0, 30.0, 29.0, precision=0.5),
    row("goca", 2.0, 29.75, 29.25, gap=-0.25),
]


# ---- table -----------------------------------------------------------------------------------------------------------
def test_table_by_scale():
    assert by_scale(ROWS, ["fid"]).splitlines() == [
        "| metric | method | scale 2 | scale 7.5 |",
        "| --- | --- | --- | --- |",
        "| fid | cfg | 30 (29 to 31) | 20 (19 to 21) |",
        "| fid | goca | 29.75 (28.75 to 30.75)<br>-0.25 (-0.75 to +0.25), within noise | 19 (18 to 20)<br>-1 (-1.5 to -0.5) |",
    ]


def test_table_of_all_metrics_and_models():
    rows = [ROWS[0] | {"precision": 0.5, "recall": 0.25}, ROWS[1] | {"model": "other"}]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in by_scale(rows).splitlines()]
    assert lines[0] == ["metric", "model", "method", "scale 7.5"]
    assert [line[:3] for line in lines[2:]] == [
        [metric, model, method]
        for metric in ("fid", "clip_score", "precision", "recall")
        for model, method in (("tiny-sd", "cfg"), ("other", "goca"))
    ]
    assert [line[3] for line in lines[-4:]] == ["0.5", "", "0.25", ""]


# ---- curves ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def drawn(monkeypatch):
    figures = []
    monkeypatch.setattr(scales, "write", lambda figure, path: figures.append(figure))
    return figures


def test_curves_follow_the_scale(drawn, tmp_path):
    trade_off(ROWS, tmp_path / "a.png")
    ((axes,),) = [figure.axes for figure in drawn]
    assert axes.get_xlabel().startswith("clip_score")
    assert axes.get_ylabel().startswith("fid")
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert curves == {"cfg": [[29, 30], [31.5, 20]], "goca": [[29.25, 29.75], [31.75, 19]]}
    assert [text.get_text() for text in axes.texts] == ["2", "7.5"] * 2
    segments = [segment.tolist() for bars in axes.collections for segment in bars.get_segments()]
    assert [[28, 30], [30, 30]] in segments
    assert [[29, 29], [29, 31]] in segments


def test_curves_need_two_kinds_of_metrics(drawn, tmp_path):
    trade_off([{"method": "cfg", "model": "a", "guidance_scale": 5, "fid": 1.0}], tmp_path / "a.png")
    assert not drawn


def test_a_panel_for_each_model(drawn, tmp_path):
    others = [each | {"model": "other", "kid": 0.1, "kid_interval": [0, 0.2]} for each in ROWS]
    trade_off([*ROWS, *others], tmp_path / "a.png")
    titles = [(axes.get_title(), axes.get_ylabel().split()[0]) for axes in drawn[0].axes]
    assert titles == [("tiny-sd", "fid"), ("other", "fid"), ("other", "kid")]
