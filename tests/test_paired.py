"""Paired runs: bootstrap intervals that cover and that pairing narrows; folders that are no runs, runs that are no pairs."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from eval.distances import KernelDistance, frechet, frechet_draws, statistics
from eval.paired import base_of, difference, interval, ratio_draws, read_run, resamples


def run_folder(root, method="cfg", ids=("000000", "000001", "000002"), seed=0, size=(64, 64), **changes):
    """A run folder as `eval.coco30k` leaves it; images of noise."""
    (root / "images").mkdir(parents=True)
    rng, rows = np.random.default_rng(seed), []
    for number, name in enumerate(ids):
        path = root / "images" / f"{name}.png"
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append((name, ("a cat on grass", "a dog and a bus on sand", "bird, sky")[number % 3], 7, digest))
    table = pd.DataFrame(rows, columns=["id", "caption", "seed", "sha256"])
    table.insert(3, "file", [f"images/{name}.png" for name in ids])
    table.to_csv(root / "manifest.csv", index=False)
    settings = {
        "method": method,
        "model": "tiny",
        "captions": "scenes",
        "guidance_scale": 5.0,
        "steps": 20,
        "seed": 42,
    }
    (root / "settings.json").write_text(json.dumps({"command": "", "settings": settings | changes}))
    return root


# ---- bootstrap -------------------------------------------------------------------------------------------------------
def test_resamples_are_those_of_ids():
    weights = resamples(50, 400)
    assert weights.shape == (400, 50)
    assert (weights.sum(1) == 50).all()
    assert np.array_equal(weights, resamples(50, 400))
    assert (weights > 0).mean() == pytest.approx(1 - (1 - 1 / 50) ** 50, abs=0.01)
    values, asked = np.random.default_rng(0).random((2, 50))
    ids = [np.repeat(np.arange(50), row.astype(int)) for row in weights]
    expected = [values[drawn].sum() / asked[drawn].sum() for drawn in ids]
    np.testing.assert_allclose(ratio_draws(values, asked, weights), expected)


def test_interval_of_a_mean_covers():
    rng, intervals = np.random.default_rng(1), []
    weights = resamples(80, 300)
    for _ in range(400):
        sample = rng.exponential(size=80)
        intervals.append(interval(sample.mean(), ratio_draws(sample, np.ones(80), weights)))
    assert 0.9 < np.mean([low <= 1 <= high for low, high in intervals]) < 0.98


@pytest.mark.parametrize("metric", ["frechet", "kernel"])
def test_interval_of_a_distance_covers(metric):
    """Its expectation at this number of images, which for the Frechet distance is above that of infinitely many."""
    rng, values, intervals = np.random.default_rng(2), [], []
    real, weights = rng.standard_normal((500, 5)), resamples(150, 100)
    whole, kernel = statistics([real]), KernelDistance(real[:100])
    for _ in range(100):
        fake = 0.3 + rng.standard_normal((150, 5))
        if metric == "frechet":
            values.append(frechet(whole, statistics([fake])))
            draws = frechet_draws(whole, fake, weights)
        else:
            value, *draws = kernel(fake, np.vstack([np.ones(150), weights]))
            values.append(value)
        intervals.append(interval(values[-1], np.array(draws)))
    assert 0.88 < np.mean([low <= np.mean(values) <= high for low, high in intervals]) < 0.99


def test_equal_runs_do_not_differ():
    sample = np.random.default_rng(0).random(40)
    draws = ratio_draws(sample, np.ones(40), resamples(40))
    found = difference(sample.mean(), draws, sample.mean(), draws)
    assert found == {"difference": 0, "difference_interval": (0, 0), "within_noise": True}


def test_pairing_narrows():
    """A gain of 0.1 on captions that differ by 1: found with paired ids, lost without."""
    rng = np.random.default_rng(0)
    captions = rng.standard_normal(200)
    ours, base = (captions + gain + 0.1 * rng.standard_normal(200) for gain in (0.1, 0))
    one, weights = np.ones(200), resamples(200)
    draws, base_draws = (ratio_draws(sample, one, weights) for sample in (ours, base))
    unpaired = ratio_draws(base, one, resamples(200, seed=1))
    paired = difference(ours.mean(), draws, base.mean(), base_draws)
    alone = difference(ours.mean(), draws, base.mean(), unpaired)
    widths = [float(np.diff(found["difference_interval"])[0]) for found in (paired, alone)]
    assert widths[0] < 0.3 * widths[1]
    assert (paired["within_noise"], alone["within_noise"]) == (False, True)
    assert paired["difference"] == pytest.approx(0.1, abs=0.03)


def test_a_paired_frechet_difference_is_narrower_and_found():
    """Run features that differ by a small shift of all images: the bias of resamples cancels."""
    rng = np.random.default_rng(0)
    real, base = rng.standard_normal((2, 300, 6))
    whole, ours = statistics([real]), base + 0.05
    weights = resamples(300, 200)
    values = [frechet(whole, statistics([fake])) for fake in (ours, base)]
    draws = [frechet_draws(whole, fake, weights) for fake in (ours, base)]
    assert draws[1].mean() > values[1]  # the bias of a single run
    paired = difference(values[0], draws[0], values[1], draws[1])
    alone = difference(values[0], draws[0], values[1], frechet_draws(whole, base, resamples(300, 200, seed=1)))
    assert np.diff(paired["difference_interval"]) < 0.7 * np.diff(alone["difference_interval"])
    assert np.mean(draws[0] - draws[1]) == pytest.approx(paired["difference"], abs=0.01)


# ---- runs ------------------------------------------------------------------------------------------------------------
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
        (lambda f: (f / "manifest.csv").write_text(""), "No columns"),
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
