"""The structure of the house: who may import whom, what an import loads, which names are public."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import goca_guidance


ROOT = Path(__file__).parents[1]
FLOORS = [  # a module may import modules of lower floors only
    {"records", "config", "maps"},
    {"observer", "tokens", "goca", "diffcut", "scfg", "images", "noising"},
    {"baselines", "word_baselines", "family", "segmentor"},
    {"families", "loading"},
    {"watch"},
    {"call", "forwards"},
    {"segment", "discover"},
    {"reading"},
    {"pipeline", "guider"},
    {"pictures", "cli"},
]


def imports_of(path):
    """Modules of our own that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_every_module_has_a_floor():
    modules = {path.stem for path in (ROOT / "goca_guidance").glob("*.py")} - {"__init__"}
    assert modules == set().union(*FLOORS)


@pytest.mark.parametrize("module", sorted(set().union(*FLOORS)))
def test_imports_go_down(module):
    floor = next(i for i, names in enumerate(FLOORS) if module in names)
    allowed = set().union(*FLOORS[: floor + 1]) | {"models"}
    ours = {
        n.split(".")[1] for n in imports_of(ROOT / "goca_guidance" / f"{module}.py") if n.startswith("goca_guidance.")
    }
    public = set(goca_guidance.__all__)
    assert ours - public <= allowed


def test_contributing_says_the_same():
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    stated = text.partition("(`tests/test_house.py` holds this): ")[2].partition(".")[0]
    assert [set(floor.strip("` ").split()) for floor in stated.split("<")] == FLOORS


def test_goca_and_scfg_meet_in_regions_only():
    goca, segmentor, scfg = (
        imports_of(ROOT / "goca_guidance" / f"{module}.py") for module in ("goca", "segmentor", "scfg")
    )
    families = {"goca_guidance.denoisers.base", "goca_guidance.denoisers.adapters"}
    assert not {"goca_guidance.method.scfg", *families} & (goca | segmentor)
    assert not {"goca_guidance.method.goca", "goca_guidance.method.segmentor", *families} & scfg


def test_the_library_never_imports_programs():
    for path in (ROOT / "goca_guidance").glob("*.py"):
        assert not {n for n in imports_of(path) if n.split(".")[0] in ("eval", "pipelines", "tests")}


def test_import_is_light():
    code = (
        "import sys, goca_guidance; heavy = {'matplotlib', 'scipy', 'torchvision', 'pandas', 'torchmetrics', 'open_clip'}; "
        "print(sorted(heavy & set(sys.modules)), [m for m in sys.modules if m.startswith('diffusers.pipelines.')])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[] []"


def test_public_names():
    """Removing one breaks users: deprecate it first."""
    assert set(goca_guidance.__all__) == {
        "TINY_SD",
        "Background",
        "GoCAConfig",
        "GoCAGuidance",
        "GoCASCFGPipeline",
        "GoCASCFGPipelineOutput",
        "Regions",
        "SCFGConfig",
        "Segmentation",
        "WordMaps",
    }
    assert all(getattr(goca_guidance, name) for name in goca_guidance.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = goca_guidance.nothing


def test_files_stay_small():
    for path in (ROOT / "goca_guidance").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 310, path.name
