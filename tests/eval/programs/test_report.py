"""Results are filled into documents."""

import json

import pytest

from eval import report
from eval.common import files
from tests.helpers.places import ROOT


def test_tables_are_filled_in(tmp_path):
    files.write_json(
        tmp_path / "t.json", {"command": "python -m x", "rows": [{"method": "all", "mIoU": 1.5, "settings": {}}]}
    )
    text = report.fill("before\n<!-- results: t -->\nold\n<!-- end -->\nafter", tmp_path)
    assert "| all | 1.5 |" in text
    assert "`python -m x`" in text
    assert "old" not in text
    assert report.fill(text, tmp_path) == text


def test_documents_are_filled(tmp_path):
    cfg = {"method": "cfg", "model": "tiny-sd"}
    rows = [
        cfg | {"guidance_scale": 7.5, "clip_score": 31.5, "clip_score_interval": [30.5, 32.5]},
        cfg | {"guidance_scale": 2.0, "clip_score": 29.0, "clip_score_interval": [28.0, 30.0]},
    ]
    (tmp_path / "quality-x.json").write_text(json.dumps({"command": "python -m eval.image_quality a", "rows": rows}))
    text = report.fill("<!-- scales: quality-x clip_score -->\nold\n<!-- end -->", tmp_path)
    assert "| clip_score | cfg | 29 (28 to 30) | 31.5 (30.5 to 32.5) |" in text
    assert "old" not in text
    assert "`python -m eval.image_quality a`" in text
    assert report.fill(text, tmp_path) == text


def test_committed_documents_say_what_the_results_hold():
    """Else run `make report`."""
    documents = [path for pattern in report.DOCUMENTS for path in sorted(ROOT.glob(pattern))]
    assert len(documents) > 5
    for path in documents:
        assert path.read_text() == report.fill(path.read_text(), ROOT / "results"), path


def test_outside_of_the_repository_there_is_nothing_to_fill(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="in the repository's root"):
        report.main([])
