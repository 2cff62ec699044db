"""The documents build as a site without a warning, and the notebooks run."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.places import ROOT


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_the_site_builds_strictly(tmp_path):
    """No broken link, no page left out, nothing from another place."""
    pytest.importorskip("material", reason="mkdocs-material is not installed (the extra [docs])")
    pytest.importorskip(
        "mkdocstrings_handlers.python", reason="mkdocstrings[python] is not installed (the extra [docs])"
    )
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    reference = (tmp_path / "reference.html").read_text()
    assert all(name in reference for name in ("num_noises", "rate_max", "output_negative_maps"))
    for page in tmp_path.rglob("*.html"):
        assert not any(part in page.read_text() for part in ("fonts.googleapis", "cdn.", "unpkg.com")), page


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_holds_no_output(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (the extra [notebooks])")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (the extra [notebooks])")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed (the extra [notebooks])")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) or "img" in str(output.get("data", {})) for output in shown) >= 3
    assert not any(output.output_type == "error" for output in shown)
