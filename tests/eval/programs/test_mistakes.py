"""A user's mistake in any program is one line on stderr and exit status 2, and it is found before anything is written."""

import json
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest

from eval.common import programs
from tests.helpers.places import ROOT
from tests.helpers.runs import run_folder


NAMES = [*sorted({path.stem for path in (ROOT / "eval").glob("*.py")} - {"__init__"}), "scenes.__main__"]


def ended(capsys, name, *arguments):
    """The last line on stderr of a program that ends with status 2; nothing of a traceback is above it."""
    with pytest.raises(SystemExit) as end:
        programs.run(lambda: import_module(f"eval.{name}").main([str(each) for each in arguments]))
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert "Traceback" not in told
    return told.splitlines()[-1]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept.txt").write_text("mine")
    (tmp_path / "bad.toml").write_text("x = ")
    (tmp_path / "run.toml").write_text('method = "cfg"\nsteps = 1\ncount = 2\nsize = 32\n')
    (tmp_path / "segment.toml").write_text("limit = 2\n[methods.goca]\n")
    (tmp_path / "nowhere.toml").write_text('model = "nowhere"\n')
    (tmp_path / "csv.toml").write_text('captions = "file"\n')
    (tmp_path / "nan.toml").write_text("guidance_scale = nan\n")


@pytest.mark.parametrize("name", NAMES)
def test_every_program_has_a_usage(name, capsys):
    with pytest.raises(SystemExit) as end:
        import_module(f"eval.{name}").main(["--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")
    assert "got an unknown" not in ended(capsys, name, "--no-such-flag")


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("coco30k none.toml", "none.toml"),
        ("coco30k folder", "folder"),
        ("coco30k bad.toml", "well-formed TOML in bad.toml"),
        ("coco30k nan.toml", "nan.toml: Expected `guidance_scale` to be a finite number"),
        ("coco30k csv.toml", "the columns image_id, text in file"),
        ("coco30k nowhere.toml", "nowhere"),
        ("coco30k segment.toml", "segment.toml: Expected a key of GenerationSettings, but got `limit`"),
        ("coco30k run.toml --scale nan", "--scale: expected a finite number above 0, but got 'nan'"),
        ("coco30k run.toml --limit 0", "--limit: expected a whole number of at least 1, but got '0'"),
        ("coco30k run.toml --out file", "file is a file"),
        ("segmentation none.toml", "none.toml"),
        ("segmentation bad.toml", "well-formed TOML in bad.toml"),
        ("segmentation run.toml", "run.toml: Expected a key of Experiment, but got `"),
        ("segmentation segment.toml --methods gocha", "methods among ['goca'], but got ['gocha']"),
        ("segmentation segment.toml --result folder", "folder is a folder"),
        ("segmentation segment.toml --result file/a.json", "file is a file"),
        ("segmentation segment.toml --write-prompts folder", "folder is a folder"),
        ("segmentation segment.toml --root none", "Expected no root for scenes"),
        ("segmentation segment.toml --model nowhere", "nowhere"),
        ("image_quality", "Expected run folders"),
        ("image_quality folder", "folder has no settings.json"),
        ("image_quality none", "none has no settings.json"),
        ("image_quality --write-statistics folder", "folder is a folder"),
        ("image_quality --write-statistics a.npz --reference none", "but got 'none'"),
        ("image_quality --write-statistics a.npz --reference file", "but got 'file'"),
        ("contact_sheet folder file", "folder has no settings.json"),
        ("speed --options every", 'options such as "every=2'),
        ("speed --options every=x", "but got 'every=x'"),
        ("speed --options rows=2", "but got 'rows=2'"),
        ("speed --options every=0", "but got 'every=0'"),
        ("speed --result folder", "folder is a folder"),
        ("speed --result file", "rows of this program in file"),
        ("gpu_budget --batch 0", "--batch: expected a whole number of at least 1"),
        ("gpu_budget --result folder", "folder is a folder"),
        ("gpu_budget --result file", "rows of this program in file"),
        ("core_cost --repeats 0", "--repeats: expected a whole number of at least 1"),
        ("core_cost --result folder", "folder is a folder"),
        ("least_cost --families sd1", "invalid choice"),
        ("least_cost --result folder", "folder is a folder"),
        ("savings --captions 0", "--captions: expected a whole number of at least 1"),
        ("savings --result folder", "folder is a folder"),
        ("savings --model nowhere", "nowhere"),
        ("report", "in the repository's root"),
        (
            "train_tiny tiny-unet --run folder",
            "an autoencoder in folder/vae/weights, but there is none: train vae first",
        ),
        ("train_tiny tiny-flux --ship --run folder/run", "a finished model in folder/checkpoints/tiny-flux/100"),
        ("train_tiny tiny-unet --begin nowhere --run folder/run", "there is none: train vae first"),
        ("train_tiny vae --begin nowhere", "the folder of a model to --begin with, but got nowhere"),
        ("train_tiny vae --ship", "each model's folder holds"),
        ("train_tiny vae --run file", "file is a file"),
        ("train_tiny vae --every 0", "--every: expected a whole number of at least 1"),
        ("scenes.__main__ --count 0", "--count: expected a whole number of at least 1"),
        ("scenes.__main__ --count 1 --out folder", "folder is a folder"),
        ("scenes.__main__ --count 1 --out a.none", ".none"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(program, told, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert told in ended(capsys, *program.split())
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "folder" / "kept.txt").read_text() == (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("settings.json", "{}", "the settings of a run in "),
        ("settings.json", "[]", "the settings of a run in "),
        ("settings.json", "{", "the settings of a run in "),
        ("settings.json", '{"settings": [1]}', "the settings of a run in "),
        ("settings.json", '{"settings": {"method": 3}}', "method, model"),
        ("manifest.csv", "\xff", "a table of texts in "),
        ("manifest.csv", "id,caption,file,sha256\n1,a\n", "rows of different lengths"),
        ("manifest.csv", 'id,caption,file,sha256\n1,"a,images/1.png,x\n', "a table of texts in "),
        ("failed.csv", "", "failed.csv, but got ValueError: no columns"),
    ],
)
@pytest.mark.parametrize("program", ["image_quality", "contact_sheet"])
def test_damaged_runs_are_named(program, name, content, told, tmp_path, capsys):
    folder = run_folder(tmp_path / "a", "goca")
    (folder / name).write_bytes(content.encode("latin-1"))
    others = [run_folder(tmp_path / "b")] if program == "contact_sheet" else ["--metrics", "caption_accuracy"]
    line = ended(capsys, program, folder, *others)
    assert told in line
    assert str(folder) in line


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"rows": {"a": 1}, "command": 3}', '{"rows": [{}]}', '{"rows": 3}']
)
@pytest.mark.parametrize("name", ["speed-x", "quality-x", "segment-x"])
def test_damaged_results_are_named(name, content, tmp_path, capsys):
    table = {"quality-x": "scales: quality-x", "segment-x": "papers: mIoU"}.get(name, f"results: {name}")
    (tmp_path / "README.md").write_text(f"<!-- {table} -->\n<!-- end -->")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / f"{name}.json").write_text(content)
    assert f"results/{name}.json" in ended(capsys, "report")


def test_a_result_that_is_not_there_is_named(tmp_path, capsys):
    (tmp_path / "README.md").write_text("<!-- results: nothing -->\n<!-- end -->")
    assert "results/nothing.json" in ended(capsys, "report")


@pytest.mark.parametrize("damage", [b"", b"PK", None])
def test_a_damaged_file_of_statistics_is_named(damage, tmp_path, capsys):
    path = tmp_path / "statistics.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    path.write_bytes(path.read_bytes()[:-40] if damage is None else damage)
    line = ended(capsys, "image_quality", "--write-statistics", "b.npz", "--reference", path)
    assert str(path) in line


def test_the_line_is_the_programs_own(tmp_path):
    """As a user sees it: the program's name, one line, status 2."""
    program = [sys.executable, "-m", "eval.scenes", "--out", str(tmp_path / "folder")]
    ran = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("eval.scenes: error: Expected the name of a file to write, but ")
    assert ran.stderr.count("\n") == 1


def test_run_settings_that_generation_would_refuse(tmp_path, capsys):
    folders = [run_folder(tmp_path / "a", "goca", steps=2.5), run_folder(tmp_path / "b", steps=2.5)]
    line = ended(capsys, "contact_sheet", *folders)
    assert f"{folders[0] / 'settings.json'}: Expected `steps` to be a whole number" in line
    assert json.loads((folders[0] / "settings.json").read_text())
