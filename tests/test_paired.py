"""Paired runs: bootstrap intervals that cover and that pairing narrows; folders that are no runs, runs that are no pairs."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from eval.common.intervals import difference, interval, jackknife, left_out, ratio_draws, resamples
from eval.generation.distances import KernelDistance, frechet, frechet_draws, statistics
from eval.generation.run_folder import base_of, read_run


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


@pytest.mark.parametrize(("metric", "size"), [("frechet", 5), ("frechet", 75), ("kernel", 5)])
def test_interval_of_a_distance_covers(metric, size):
    """Its expectation at this number of images, which for the Frechet distance is above that of infinitely many."""
    rng, values, intervals = np.random.default_rng(2), [], []
    real, shift = rng.standard_normal((500, size)), 0.3 * (5 / size) ** 0.5
    whole, kernel = statistics([real]), KernelDistance(real[:100])
    for _ in range(100):
        fake = shift + rng.standard_normal((150, size))
        if metric == "frechet":
            values.append(frechet(whole, statistics([fake])))
            intervals.append(jackknife(values[-1], frechet_draws(whole, fake, left_out(150))))
        else:
            value, *draws = kernel(fake, np.vstack([np.ones(150), resamples(150, 100)]))
            values.append(value)
            intervals.append(interval(value, np.array(draws)))
    assert 0.88 < np.mean([low <= np.mean(values) <= high for low, high in intervals]) < 1 - 1e-9
    width = np.mean(np.diff(intervals)) / 3.92
    assert 0.8 < width / np.std(values) < 1.6


def test_jackknife_of_a_mean_is_its_standard_error():
    sample = np.random.default_rng(0).standard_normal(40)
    weights = left_out(40)
    assert np.array_equal(weights.sum(0), np.full(40, 39))
    low, high = jackknife(sample.mean(), ratio_draws(sample, np.ones(40), weights))
    assert (high - low) / 3.92 == pytest.approx(sample.std(ddof=1) / 40**0.5)
    assert (low + high) / 2 == pytest.approx(sample.mean())


def test_groups_are_as_large_as_each_other():
    weights = left_out(1003)
    assert len(weights) == 40
    assert set((weights == 0).sum(1)) == {25, 26}
    assert ((weights == 0).sum(0) == 1).all()
    with pytest.raises(ValueError, match="three images"):
        left_out(2)


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
    """Run features that differ by a small shift of all images."""
    rng = np.random.default_rng(0)
    real, base = rng.standard_normal((2, 300, 6))
    whole, ours = statistics([real]), base + 0.15
    values = [frechet(whole, statistics([fake])) for fake in (ours, base)]
    draws, base_draws = (frechet_draws(whole, fake, left_out(300)) for fake in (ours, base))
    paired = difference(values[0], draws, values[1], base_draws, jackknife)
    alone = difference(values[0], draws, values[1], frechet_draws(whole, base, left_out(300, seed=1)), jackknife)
    assert np.diff(paired["difference_interval"]) < 0.85 * np.diff(alone["difference_interval"])
    assert not paired["within_noise"]


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
