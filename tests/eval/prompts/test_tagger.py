"""The zero-shot tagger: its probabilities are CLIP's, and its weights are loaded or asked for by name. Tiny random weights."""

import open_clip
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from eval.prompts.sources import Entity, Prompt
from eval.prompts.tagger import Tagger


CLASSES = ("person", "background", "dog", "potted plant", "tree")
LABELS = [0, 2, 3, 4]


@pytest.fixture
def clip(tiny_clip):
    return tiny_clip[0]


@pytest.fixture
def image(rng):
    return Image.fromarray(torch.randint(0, 256, (40, 56, 3), generator=rng, dtype=torch.uint8).numpy())


def test_probabilities_are_those_of_clip(clip, image):
    """Pair by pair, from the unnormalised features and open_clip's own preprocessing and temperature."""
    torch.manual_seed(0)
    tagger = Tagger(CLASSES, clip, pretrained=None)
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(clip)
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
def test_tags(clip, threshold, probabilities, labels):
    tagger = Tagger(CLASSES, clip, pretrained=None, threshold=threshold)
    assert tagger.tags(torch.tensor(probabilities)) == labels


def test_prompt_names_the_tags_and_not_the_truth(clip, image):
    tagger = Tagger(CLASSES, clip, pretrained=None, threshold=1.0)
    best = LABELS[tagger.probabilities(image).argmax()]
    for present in ((), (0,), (4,)):
        assert tagger("a", image, present) == [Prompt(CLASSES[best], (Entity(CLASSES[best], best),))]


def test_checkpoint_by_path(clip, image, tmp_path):
    torch.manual_seed(1)
    model = open_clip.create_model(clip)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(2)
    loaded, other = Tagger(CLASSES, clip, str(tmp_path / "weights.pt")), Tagger(CLASSES, clip, None)
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


def test_file_that_is_no_checkpoint(clip, tmp_path):
    (tmp_path / "weights.pt").write_text("not weights")
    with pytest.raises(ValueError, match="weights"):
        Tagger(CLASSES, clip, str(tmp_path / "weights.pt"))


def test_threshold_is_a_probability(clip):
    with pytest.raises(ValueError, match="threshold"):
        Tagger(CLASSES, clip, None, threshold=0)
