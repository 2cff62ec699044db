"""The sheet of pairs: the images of two runs, and what guided them."""

import numpy as np
import pytest
import torch
from PIL import Image

from eval import coco30k, contact_sheet
from eval.generation import generator as generation
from eval.generation.generator import GenerationSettings, batches
from eval.generation.run_folder import read_run


SETTINGS = {"count": 5, "steps": 3, "batch": 2, "scheduler": "DPMSolverMultistepScheduler"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for method in ("cfg", "goca"):
        coco30k.GenerationRun(GenerationSettings(method=method, **SETTINGS), root / method)()
    return root


def test_sheet_shows_what_guided(folders, tmp_path, capsys):
    out = tmp_path / "pairs.png"
    contact_sheet.main([*(str(folders / name) for name in ("cfg", "goca")), "--count", "3", "--out", str(out)])
    assert "different" not in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.size[0] > picture.size[1]


def test_looks_are_those_of_the_run(folders):
    """The same images again, bit for bit, with the regions and maps of a call of the pipeline."""
    goca, item = read_run(folders / "goca"), read_run(folders / "goca").items[3]
    look = contact_sheet.looks(goca, [item])[item.id]
    assert look.equal
    generator = generation.Generator(GenerationSettings(**SETTINGS))
    texts = generator.settings.texts()
    batch = next(names for names in batches(texts, 2) if item.id in names)
    output = generator.call({name: texts[name] for name in batch}, output_regions=True)
    assert torch.equal(look.maps, output.guidance_maps[:, batch.index(item.id), 0])
    assert look.regions.labels[look.sample] == output.regions[-1].labels[batch.index(item.id)]
    assert look.maps.std() > 0.01


def test_half_of_the_images_are_nobodys_choice(folders):
    cfg, goca = (read_run(folders / name) for name in ("cfg", "goca"))
    ids = [item.id for item in contact_sheet.chosen(cfg, goca, 4)]
    assert ids[:2] == ["000000", "000004"]
    shift = {
        one.id: np.abs(contact_sheet.pixels(one) - contact_sheet.pixels(other)).mean()
        for one, other in zip(goca.items, cfg.items, strict=True)
    }
    assert ids[2:] == sorted(["000001", "000002", "000003"], key=shift.get, reverse=True)[:2]


@pytest.mark.parametrize("names", [["goca"], ["cfg", "cfg"], ["goca", "goca"]])
def test_sheet_needs_a_pair(folders, names):
    with pytest.raises(ValueError, match="one of them of method goca"):
        contact_sheet.main([str(folders / name) for name in names])


def test_sheet_of_changed_captions_is_refused(folders, monkeypatch):
    goca = read_run(folders / "goca")
    monkeypatch.setattr(GenerationSettings, "texts", lambda self: {"000000": "another caption"})
    with pytest.raises(ValueError, match="they have changed"):
        contact_sheet.looks(goca, goca.items[:1])
