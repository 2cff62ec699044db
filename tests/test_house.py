"""The structure of the house: who may import whom, what is a program, what an import loads."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import goca_guidance
from tests.helpers.places import ROOT


LIBRARY = [  # rooms of goca_guidance by floor: one imports itself and lower floors
    {"schema", "files", "models"},
    {"config"},
    {"method"},
    {"denoisers", "pictures"},
    {"mixing", "formats"},
    {"arguments", "stock", "hooks"},
    {"real_images"},
    {"pipeline", "guider", "explanation"},
    {"app", "doctor"},
    {"commands"},
    {"cli"},
]
EVAL = [
    {"common"},
    {"scenes"},
    {"datasets", "cost", "training"},
    {"prompts", "generation"},
    {"segment"},
]  # then the programs
INSIDE = {  # what of eval imports more of the library than its public names, and from where
    "eval/cost": {"config", "denoisers", "hooks", "method"},
    "eval/core_cost.py": {"method"},
    "eval/kernel_code.py": {"method"},
    "eval/speed_gpu.py": {"method"},
    "eval/gallery.py": {"pictures"},
    "eval/generation/painting.py": {"pictures"},
    "eval/common/configs.py": {"schema"},
    "eval/common/files.py": {"files"},
    "eval/generation/drawing.py": {"denoisers", "method", "real_images", "stock"},
    "eval/generation/generator.py": {"denoisers", "schema", "stock"},
    "eval/prompts": {"schema"},
    "eval/generation/checkpoint_quality.py": {"stock"},
    "eval/segment/experiment.py": {"schema"},
    "eval/segment/methods.py": {"schema"},
    "eval/segment/baselines.py": {"config", "method"},
    "eval/segment/best_and_worst.py": {"pictures"},
    "eval/segment/label_maps.py": {"method"},
    "eval/segment/level_picture.py": {"pictures"},
    "eval/segment/level_choices.py": {"denoisers"},
    "eval/segment/together.py": {"config", "method"},
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {
    module_of(path): path for room in ("goca_guidance", "eval", "pipelines") for path in (ROOT / room).rglob("*.py")
}
PROGRAMS = {path.stem for path in (ROOT / "eval").glob("*.py")} - {"__init__"}


def imports_of(path: Path) -> set[str]:
    """Modules of our own that a file imports anywhere, but for type checkers."""
    tree, names = ast.parse(path.read_text()), set()
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in set(ast.walk(tree)) - skipped:
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in FILES else node.module for name in inner}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.partition(".")[0] in ("goca_guidance", "eval", "pipelines", "tests")}


def room_of(module: str) -> str:
    """The part of a module's path below its package: a folder's name, or a file's."""
    return module.split(".")[1] if "." in module else ""


def test_no_import_goes_in_a_circle():
    TopologicalSorter({module: imports_of(path) - {module} for module, path in FILES.items()}).prepare()


@pytest.mark.parametrize(("package", "floors"), [("goca_guidance", LIBRARY), ("eval", [*EVAL, PROGRAMS])])
def test_imports_go_down(package, floors):
    rooms = {room_of(module) for module in FILES if module.startswith(f"{package}.")}
    assert rooms == set().union(*floors)
    for module, path in FILES.items():
        if module.startswith(f"{package}."):
            room = room_of(module)
            floor = next(number for number, rooms in enumerate(floors) if room in rooms)
            allowed = {"", room}.union(*floors[:floor])
            ours = {name for name in imports_of(path) if name.partition(".")[0] == package}
            assert {name for name in ours if room_of(name) not in allowed} == set(), path


def test_the_library_imports_none_of_the_rest():
    for module, path in FILES.items():
        if module.startswith("goca_guidance"):
            assert {name for name in imports_of(path) if not name.startswith("goca_guidance")} == set(), path


def test_the_papers_are_torch_alone():
    """And they meet in `Regions` only."""
    for path in (ROOT / "goca_guidance" / "method").glob("*.py"):
        names = {alias.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import)
                 for alias in node.names}  # fmt: skip
        names |= {n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)}
        assert not {"diffusers", "transformers"} & {name.partition(".")[0] for name in names}, path
        if path.stem in ("goca", "segmentor"):
            assert "goca_guidance.method.scfg" not in names
        if path.stem == "scfg":
            assert not {"goca_guidance.method.goca", "goca_guidance.method.segmentor"} & names


def test_the_rest_uses_the_librarys_public_names():
    for module, path in FILES.items():
        if module.startswith(("eval", "pipelines")):
            place = path.relative_to(ROOT).as_posix()
            allowed = set().union(*(rooms for where, rooms in INSIDE.items() if place.startswith(where)))
            ours = {room_of(name) for name in imports_of(path) if name.startswith("goca_guidance.")}
            assert ours <= allowed, path


def test_what_lies_at_the_top_of_eval_is_a_program_and_nothing_else_is():
    marked = {
        path
        for module, path in FILES.items()
        if module.startswith("eval") and 'if __name__ == "__main__"' in path.read_text()
    }
    assert marked == {ROOT / "eval" / f"{name}.py" for name in PROGRAMS} | {ROOT / "eval/scenes/__main__.py"}
    listed = (ROOT / "eval" / "README.md").read_text()
    assert [name for name in (*PROGRAMS, "scenes") if f"eval.{name}" not in listed] == []


@pytest.mark.parametrize(
    "measuring",
    [
        "eval.segment.running",
        "eval.segment.level_counts",
        "eval.speed",
        "eval.cost.budget",
        "eval.generation.features",
    ],
)
def test_a_cache_knows_what_its_numbers_depend_on(measuring):
    """All that the measuring module imports is among its `MODULES`, but what reads, writes and shows."""
    named, reached, waiting = import_module(measuring).MODULES, set(), [measuring]
    while waiting:
        module = waiting.pop()
        reached.add(module)
        waiting += [name for name in imports_of(FILES[module]) if name in FILES and name not in reached]
    covered = {name for name in reached if any(f"{name}.".startswith(f"{each}.") for each in named)}
    shown = {"files", "provenance", "intervals", "configs", "tables", "programs", "rows"}
    if measuring == "eval.generation.features":  # of the library it takes the autoencoder only, whose digest it notes
        covered |= {name for name in reached if name.startswith("goca_guidance")} | {"eval.common.processes"}
    assert reached - covered <= {"eval", "goca_guidance", "eval.segment.results"} | {f"eval.common.{n}" for n in shown}


def test_tests_import_no_tests():
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert not {name for name in imports_of(path) if name.rpartition(".")[2].startswith("test_")}, path


def test_import_is_light():
    code = (
        "import sys, goca_guidance; heavy = {'matplotlib', 'scipy', 'torchvision', 'pandas', 'torchmetrics', 'open_clip'}; "
        "print(sorted(heavy & set(sys.modules)), [m for m in sys.modules if m.startswith('diffusers.pipelines.')])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[] []"


def test_help_is_told_without_torch():
    code = "import sys, goca_guidance.cli as cli; cli._parser().format_help(); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "False"


def test_every_public_name_can_be_had():
    """Removing one breaks users: deprecate it first."""
    names = (
        "TINY_SD Background GoCAConfig GoCAGuidance GoCASCFGPipeline GoCASCFGPipelineOutput Regions SCFGConfig".split()
    )
    assert {*names, "Segmentation", "WordMaps"} <= set(goca_guidance.__all__)
    assert all(getattr(goca_guidance, name) for name in goca_guidance.__all__)
    assert set(goca_guidance.__all__) <= set(dir(goca_guidance))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = goca_guidance.nothing
