"""The zero-shot tagger: its probabilities are CLIP's, and its weights are loaded or asked for by name. Tiny random weights."""

import json

import open_clip
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from eval.prompts.sources import Entity, Prompt
from eval.prompts.tagger import Tagger


CLASSES = ("person", "background", "dog", "potted plant", "tree")
LABELS = [0, 2, 3, 4]
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The name of a tiny model that open_clip can build."""
    path = tmp_path_factory.mktemp("open_clip") / "tiny-goca-test.json"
    path.write_text(json.dumps(TINY))
    open_clip.add_model_config(path)
    return path.stem


@pytest.fixture
def image(rng):
    return Image.fromarray(torch.randint(0, 256, (40, 56, 3), generator=rng, dtype=torch.uint8).numpy())


def test_probabilities_are_those_of_clip(tiny, image):
    """Pair by pair, from the unnormalised features and open_clip's own preprocessing and temperature."""
    torch.manual_seed(0)
    tagger = Tagger(CLASSES, tiny, pretrained=None)
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(tiny)
    model.eval()
    with torch.no_grad():
        seen = model.encode_image(preprocess(image)[None])
        texts = [f"a photo of a {CLASSES[label]}" for label in LABELS]
        cosines = [cosine_similarity(seen, model.encode_text(open_clip.tokenize([t]))) for t in texts]
        expected = torch.cat([model.logit_scale.exp() * c for c in cosines]).softmax(0)
    assert tagger.labels == LABELS
    torch.testing.assert_close(tagger.probabilities(image), expected)
    torch.testing.assert_close(tagger.probabilities(image.convert("RGBA")), expected)


@pytest.mark.parametrize(
    ("threshold", "probabilities", "labels"),
    [
        (0.1, [0.5, 0.05, 0.3, 0.15], [0, 3, 4]),
        (0.4, [0.5, 0.1, 0.3, 0.1], [0]),
        (0.9, [0.2, 0.3, 0.1, 0.4], [4]),
        (1.0, [0.0, 1.0, 0.0, 0.0], [2]),
        (0.25, [0.25, 0.25, 0.25, 0.25], [0, 2, 3, 4]),
    ],
)
def test_tags(tiny, threshold, probabilities, labels):
    tagger = Tagger(CLASSES, tiny, pretrained=None, threshold=threshold)
    assert tagger.tags(torch.tensor(probabilities)) == labels


def test_prompt_names_the_tags_and_not_the_truth(tiny, image):
    tagger = Tagger(CLASSES, tiny, pretrained=None, threshold=1.0)
    best = LABELS[tagger.probabilities(image).argmax()]
    for present in ((), (0,), (4,)):
        assert tagger("a", image, present) == [Prompt(CLASSES[best], (Entity(CLASSES[best], best),))]


def test_checkpoint_by_path(tiny, image, tmp_path):
    torch.manual_seed(1)
    model = open_clip.create_model(tiny)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(2)
    loaded, other = Tagger(CLASSES, tiny, str(tmp_path / "weights.pt")), Tagger(CLASSES, tiny, None)
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not torch.allclose(loaded.probabilities(image), other.probabilities(image))


@pytest.mark.parametrize(
    ("model", "pretrained"),
    [("ViT-B-32", "no/such/file.pt"), ("no-such-model", None), ("RN50", "openai")],
    ids=["no file", "no model", "no network"],
)
def test_weights_that_cannot_be_had(model, pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="give its path as `pretrained`"):
        Tagger(CLASSES, model, pretrained)


def test_file_that_is_no_checkpoint(tiny, tmp_path):
    (tmp_path / "weights.pt").write_text("not weights")
    with pytest.raises(ValueError, match="weights"):
        Tagger(CLASSES, tiny, str(tmp_path / "weights.pt"))


def test_threshold_is_a_probability(tiny):
    with pytest.raises(ValueError, match="threshold"):
        Tagger(CLASSES, tiny, None, threshold=0)
