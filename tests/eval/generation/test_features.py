"""Features of images are shared among processes, kept, and computed anew for other images."""

from types import SimpleNamespace

import numpy as np
import pytest

from eval.generation import features
from eval.generation.networks import Backbone
from eval.generation.run_folder import Item
from tests.helpers.runs import CPU, folder_of, mixing, picture


pytestmark = pytest.mark.usefixtures("own_folder")


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


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", None], ids=["empty", "cut", "other images"])
def test_damaged_features_are_told_and_made_again(content, tmp_path, capsys):
    items = as_items(folder_of(tmp_path / "a", 3))
    whole = features.features(items, mixing(), process(0, 1))
    (path,) = (tmp_path / "features").glob("*.npy")
    path.write_bytes(content or b"")
    if content is None:
        np.save(path, whole[:2])
    np.testing.assert_array_equal(features.features(items, mixing(), process(0, 1)), whole)
    assert f"{path.name} is damaged and is made again" in capsys.readouterr().out
