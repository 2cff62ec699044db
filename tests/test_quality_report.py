"""What is shown of generated images: the table over guidance scales, the trade-off curves, the sheet of pairs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from eval import coco30k, contact_sheet, report
from eval.generation import generator as generating
from eval.generation import scales
from eval.generation.generator import GenerationSettings, batches
from eval.generation.run_folder import read_run
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


SETTINGS = {"count": 5, "steps": 3, "batch": 2, "scheduler": "DPMSolverMultistepScheduler"}


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


def test_documents_are_filled(tmp_path):
    (tmp_path / "quality-x.json").write_text(json.dumps({"command": "python -m eval.image_quality a", "rows": ROWS}))
    text = report.fill("<!-- scales: quality-x clip_score -->\nold\n<!-- end -->", tmp_path)
    assert "| clip_score | cfg | 29 (28 to 30) | 31.5 (30.5 to 32.5) |" in text
    assert "old" not in text
    assert "`python -m eval.image_quality a`" in text
    assert report.fill(text, tmp_path) == text


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


# ---- sheet -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for method in ("cfg", "goca"):
        coco30k.GenerationRun(GenerationSettings(method=method, **SETTINGS), root / method)()
    return root


def test_sheet_shows_what_guided(folders, tmp_path, capsys):
    out = tmp_path / "pairs.png"
    contact_sheet.main([*(str(folders / name) for name in ("cfg", "goca")), "--count", "3", "--out", str(out)])
    assert "different" not in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.size[0] > picture.size[1]


def test_looks_are_those_of_the_run(folders):
    """The same images again, bit for bit, with the regions and maps of a call of the pipeline."""
    goca, item = read_run(folders / "goca"), read_run(folders / "goca").items[3]
    look = contact_sheet.looks(goca, [item])[item.id]
    assert look.again
    generator = generating.Generator(GenerationSettings(**SETTINGS))
    texts = generator.settings.texts()
    batch = next(names for names in batches(texts, 2) if item.id in names)
    output = generator.call({name: texts[name] for name in batch}, output_regions=True)
    assert torch.equal(look.maps, output.guidance_maps[:, batch.index(item.id), 0])
    assert look.regions.labels[look.sample] == output.regions[-1].labels[batch.index(item.id)]
    assert look.maps.std() > 0.01


def test_half_of_the_images_are_nobodys_choice(folders):
    cfg, goca = (read_run(folders / name) for name in ("cfg", "goca"))
    ids = [item.id for item in contact_sheet.chosen(cfg, goca, 4)]
    assert ids[:2] == ["000000", "000004"]
    shift = {
        one.id: np.abs(contact_sheet.pixels(one) - contact_sheet.pixels(other)).mean()
        for one, other in zip(goca.items, cfg.items, strict=True)
    }
    assert ids[2:] == sorted(["000001", "000002", "000003"], key=shift.get, reverse=True)[:2]


@pytest.mark.parametrize("names", [["goca"], ["cfg", "cfg"], ["goca", "goca"]])
def test_sheet_needs_a_pair(folders, names):
    with pytest.raises(ValueError, match="one of them of goca"):
        contact_sheet.main([str(folders / name) for name in names])


def test_sheet_of_changed_captions_is_refused(folders, monkeypatch):
    goca = read_run(folders / "goca")
    monkeypatch.setattr(GenerationSettings, "texts", lambda self: {"000000": "another caption"})
    with pytest.raises(ValueError, match="they have changed"):
        contact_sheet.looks(goca, goca.items[:1])
