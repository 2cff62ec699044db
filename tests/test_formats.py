"""What a segmentation is written as, against pycocotools, numpy and Pillow; no model is needed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from goca_guidance import Background, Segmentation
from goca_guidance.files import Results, pictures_in, slug
from goca_guidance.formats import joined_coco


FILES = {
    "overlay": {"overlay.png"},
    "labels": {"labels.png", "classes.txt"},
    "masks": {"masks/0-cat.png", "masks/1-a-b.png", "masks/2-dog.png", "masks/3-background.png"},
    "cutouts": {"cutouts/0-cat.png", "cutouts/1-a-b.png"},
    "coco": {"coco.json"},
    "scores": {"scores.npz"},
}


@pytest.fixture
def found() -> Segmentation:
    """Two images: a cat on the left and a/b on the right of the upper half, background below; a dog nowhere."""
    scores = torch.zeros(2, 3, 4, 4)
    scores[:, 0, :2, :2] = scores[:, 1, :2, 2:] = 1
    rng = np.random.default_rng(0)
    sizes = ((8, 12), (16, 8))
    pictures = tuple(Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes)
    return Segmentation(scores, ("cat", "a/b", "dog", "background"), sizes, Background(threshold=0.4),
                        scores[:, :0], pictures)  # fmt: skip


def written(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_every_format_says_the_same(found, tmp_path):
    assert found.save(tmp_path, list(FILES), ["one", "two"]) == [tmp_path / "one", tmp_path / "two"]
    for image, name in enumerate(["one", "two"]):
        folder, labels = tmp_path / name, found.label_maps[image].numpy()
        assert written(folder) == set().union(*FILES.values())
        with Image.open(folder / "labels.png") as file:
            assert file.mode == "P"
            assert np.array_equal(np.asarray(file), labels)
        assert (folder / "classes.txt").read_text().splitlines() == list(found.classes)
        coco, ids = COCO(str(folder / "coco.json")), {"cat": 0, "a-b": 1}
        assert [each["name"] for each in coco.dataset["categories"]] == ["cat", "a/b", "dog"]
        assert coco.imgs[1] == {"id": 1, "file_name": name, "width": labels.shape[1], "height": labels.shape[0]}
        for stem, index in ids.items():
            where = labels == index
            (mark,) = (each for each in coco.anns.values() if each["category_id"] == index + 1)
            assert np.array_equal(coco.annToMask(mark), where)
            assert mark["area"] == where.sum()
            with Image.open(folder / f"masks/{index}-{stem}.png") as file:
                assert np.array_equal(np.asarray(file), 255 * where)
            with Image.open(folder / f"cutouts/{index}-{stem}.png") as file:
                assert np.array_equal(np.asarray(file)[..., 3], 255 * where)
                assert np.array_equal(np.asarray(file)[..., :3], np.asarray(found.pictures[image]))
        with np.load(folder / "scores.npz") as file:
            assert np.array_equal(file["scores"], found.scores[image].numpy())
            assert (file["classes"].tolist(), file["size"].tolist()) == (["cat", "a/b", "dog"], list(labels.shape))


@pytest.mark.parametrize("asked", FILES)
def test_a_format_alone(found, tmp_path, asked):
    alone = replace(found, scores=found.scores[:1], entities=found.entities[:1], sizes=found.sizes[:1],
                    pictures=found.pictures[:1])  # fmt: skip
    assert alone.save(tmp_path, [asked]) == [tmp_path]
    assert written(tmp_path) == FILES[asked]


def test_coco_of_several_images_is_one(found, tmp_path):
    folders = found.save(tmp_path, ["coco"])
    assert [folder.name for folder in folders] == ["1", "2"]
    (tmp_path / "all.json").write_text(
        json.dumps(joined_coco(json.loads((f / "coco.json").read_text()) for f in folders))
    )
    coco = COCO(str(tmp_path / "all.json"))
    assert len(coco.imgs) == 2
    assert len(coco.anns) == 4
    for number in (1, 2):
        (mark,) = coco.loadAnns(coco.getAnnIds(imgIds=number, catIds=1))
        assert np.array_equal(coco.annToMask(mark), found.mask("cat", number - 1).numpy())


def test_masks_and_drawings(found):
    assert torch.equal(found.mask("background", 1), found.label_maps[1] == 3)
    assert found.overlay(1)._repr_png_().startswith(b"\x89PNG")
    assert [axis.get_title() for axis in found.overlay().axes] == ["image", "segmentation"]
    assert found._repr_html_().count("data:image/png;base64,") == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, out: s.mask("cow"), r"Expected a class of the segmentation \(cat, a/b, dog, background\), but got 'cow'"),
        (lambda s, out: s.mask("cat", 2), "number of an image from 0 to 1, but got 2"),
        (lambda s, out: s.save(out, ["png"]), r"Expected `formats\[0\]` to be one of 'overlay', .* but got 'png'"),
        (lambda s, out: s.save(out, names=["a"]), "one name for each of the 2 images, but got 1"),
        (lambda s, out: replace(s, pictures=()).overlay(), "Expected the `pictures` beside the scores"),
    ],
)  # fmt: skip
def test_mistakes(found, tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(found, tmp_path)
    assert not list(tmp_path.iterdir())


def test_coco_without_its_package(found, tmp_path, monkeypatch):
    monkeypatch.setattr("goca_guidance.formats.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'Expected pycocotools .* pip install "goca-guidance\[coco\]"'):
        found.save(tmp_path, ["labels", "coco"])
    assert not list(tmp_path.iterdir())


# ---- files -----------------------------------------------------------------------------------------------------------
def test_pictures_of_files_folders_and_globs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.png", "a/2.JPG", "a/notes.txt", "a/.hidden.png", "a/deep/3.png", "b[1].png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    names = lambda *asked: [path.as_posix() for path in pictures_in(asked)]  # noqa: E731
    assert names("a") == names("a/*") == names("a/1.png", "a") == ["a/1.png", "a/2.JPG"]
    assert names("a/**/*.png") == ["a/1.png", "a/deep/3.png"]
    assert names("b[1].png", "nowhere.png") == ["b[1].png", "nowhere.png"]
    for empty in (".git*", "a/deep/*.jpg"):
        with pytest.raises(ValueError, match="Expected pictures in"):
            pictures_in([empty])


def test_results_go_on_and_are_not_taken_for_anothers(tmp_path):
    wanted = {"/x/cat.jpg": "cat", "/y/Cat.png": "Cat", "/z/settings.json.png": "settings.json"}
    (tmp_path / "dog").mkdir()
    results = Results.of_several(tmp_path, {"classes": ["a"], "seed": 0}, wanted)
    assert not (tmp_path / "settings.json").exists()
    with pytest.raises(ZeroDivisionError), results.writing("/x/cat.jpg") as folder:
        (folder / "labels.png").write_text(f"half {1 / 0}")
    assert not results.is_finished("/x/cat.jpg")
    with results.writing("/x/cat.jpg") as folder:
        assert not list(folder.iterdir())
        (folder / "labels.png").write_text("whole")
    more = {**wanted, "/a/cat.gif": "cat", "/d/dog.png": "dog"}
    again = Results.of_several(tmp_path, {"classes": ("a",), "seed": 0}, more)
    assert [name for name in again.names.values()] == ["cat", "Cat-2", "settings.json-2", "cat-3", "dog-2"]
    assert [item for item in more if again.is_finished(item)] == ["/x/cat.jpg"]
    with pytest.raises(ValueError, match=r"classes was \['a'\] and is \['b'\].*: name another --out, or remove it"):
        Results.of_several(tmp_path, {"classes": ["b"], "seed": 0}, wanted)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json, but it is damaged: name another"):
        Results.of_several(tmp_path, {"classes": ["a"], "seed": 0}, wanted)


@pytest.mark.parametrize(
    ("text", "name"), [("a cat, on grass!", "a-cat-on-grass"), ("../..", "unnamed"), ("猫 x", "猫-x")]
)
def test_names_of_files(text, name):
    assert slug(text) == name
