"""Run folders: what is read of them, what is none, and runs that are no pairs."""

import hashlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from eval.generation.run_folder import base_of, digest_of_png, png_bytes, read_run
from tests.helpers.runs import run_folder


def test_a_run_is_read(tmp_path):
    folder = run_folder(
        tmp_path / "a", ids=("10", "9"), model=str(tmp_path), captions="x/MS-COCO_val2014_30k_captions.csv"
    )
    (folder / "failed.csv").write_text('id,reason\n"12","The caption is empty."\n')
    (folder / "images" / ".part-11.png").write_text("half")
    found = read_run(folder)
    assert [item.id for item in found.items] == ["10", "9"]
    assert [item.caption for item in found.items] == ["a cat on grass", "a dog and a bus on sand"]
    assert found.group == {"model": tmp_path.name, "captions": "coco30k", "guidance_scale": 5.0}
    assert found.failed == 1
    assert base_of(found, [found]) is None


def test_captions_are_read_as_they_stand(tmp_path):
    folder = run_folder(tmp_path / "a")
    table = pd.read_csv(folder / "manifest.csv", dtype=str)
    table["caption"] = ["NA", 'a "dog",\nand 🐈', "null"]
    table.to_csv(folder / "manifest.csv", index=False)
    assert [item.caption for item in read_run(folder).items] == ["NA", 'a "dog",\nand 🐈', "null"]
    assert read_run(folder).items[0].id == "000000"


def spoil_duplicate(folder):
    table = (folder / "manifest.csv").read_text().splitlines()
    (folder / "manifest.csv").write_text("\n".join([*table, table[-1]]) + "\n")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda f: (f / "manifest.csv").unlink(), "no manifest.csv: finish"),
        (lambda f: (f / "settings.json").unlink(), "no settings.json"),
        (
            lambda f: (f / "settings.json").write_text('{"settings": {"method": "cfg"}}'),
            "captions, guidance_scale, model",
        ),
        (lambda f: (f / "manifest.csv").write_text("id,caption\n1,a\n"), "file, sha256"),
        (lambda f: (f / "manifest.csv").write_text("id,caption,seed,file,sha256\n"), "empty"),
        (lambda f: (f / "manifest.csv").write_text(""), "no columns"),
        (spoil_duplicate, "twice: 000002"),
        (lambda f: (f / "images" / "000001.png").unlink(), "these lack: 000001.png"),
        (lambda f: (f / "images" / "notes.txt").write_text(""), "found: notes.txt"),
    ],
    ids=["manifest", "settings", "few settings", "columns", "no rows", "no table", "duplicate", "missing", "foreign"],
)
def test_folders_that_are_no_runs(spoil, match, tmp_path):
    folder = run_folder(tmp_path / "a")
    spoil(folder)
    with pytest.raises(ValueError, match=match):
        read_run(folder)


def test_the_base_is_the_cfg_run_of_the_group(tmp_path):
    made = {"cfg": {}, "goca": {}, "scfg": {}, "far": {"guidance_scale": 7.5}, "other": {"model": "large"}}
    runs = {
        name: read_run(run_folder(tmp_path / name, name if name in ("cfg", "scfg") else "goca", **changes))
        for name, changes in made.items()
    }
    bases = {name: base_of(run, list(runs.values())) for name, run in runs.items()}
    assert bases == {"cfg": None, "goca": runs["cfg"], "scfg": runs["cfg"], "far": None, "other": None}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ids": ("000000", "000001")}, "only in one: 000002"),
        ({"ids": ("000000", "000001", "000002", "000003")}, "only in one: 000003"),
        ({"ids": ("000001", "000000", "000002")}, "only in one: 000000, 000001"),
        ({"seed": 1, "steps": 50}, "these differ: steps"),
        ({"weights": "abc"}, "these differ: weights"),
    ],
    ids=["fewer", "more", "other captions", "steps", "weights"],
)
def test_runs_that_are_no_pair(changes, match, tmp_path):
    runs = [read_run(run_folder(tmp_path / "a")), read_run(run_folder(tmp_path / "b", "goca", **changes))]
    with pytest.raises(ValueError, match=match):
        base_of(runs[1], runs)


def test_two_bases(tmp_path):
    runs = [
        read_run(run_folder(tmp_path / name, method)) for name, method in (("a", "cfg"), ("b", "cfg"), ("c", "goca"))
    ]
    with pytest.raises(ValueError, match="one cfg run"):
        base_of(runs[2], runs)


def test_every_truncation_and_every_flipped_byte_is_seen(tmp_path):
    path = tmp_path / "image.png"
    data = png_bytes(Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)))
    path.write_bytes(data)
    assert digest_of_png(path, 4) == hashlib.sha256(data).hexdigest()
    assert digest_of_png(path, 8) is None
    broken = [data[:i] for i in range(len(data))]
    broken += [data[:i] + bytes([data[i] ^ 64]) + data[i + 1 :] for i in range(len(data))]
    for each in broken:
        path.write_bytes(each)
        assert digest_of_png(path, 4) is None
    Image.new("L", (4, 4)).save(path)
    assert digest_of_png(path, 4) is None
