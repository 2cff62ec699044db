"""Models that are loaded once, and runs in folders of their own."""

import json

import open_clip
import pytest
import torch

from eval.common.load import load_pipeline
from eval.generation import features, generator
from goca_guidance import TINY_SD
from tests.helpers.guided import guided


TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def tiny():
    """The embedded model."""
    return load_pipeline(TINY_SD, device="cpu")


@pytest.fixture
def one_model(tiny, monkeypatch):
    """Each run of generation has a pipeline of its own on the same modules."""
    monkeypatch.setattr(generator, "load_pipeline", lambda *args: guided(tiny))


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """The name of a tiny CLIP that open_clip can build, and a file of its weights."""
    path = tmp_path_factory.mktemp("open_clip") / "tiny-goca-test.json"
    path.write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    weights = path.with_suffix(".pt")
    torch.save(open_clip.create_model(path.stem).state_dict(), weights)
    return path.stem, str(weights)


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Nothing is written elsewhere, features included."""
    monkeypatch.setattr(features, "RUNS", tmp_path / "features")
    monkeypatch.chdir(tmp_path)
