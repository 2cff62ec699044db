"""The HTML page of the benchmarks: read again by an XML parser, its numbers compared with those that were written."""

import re
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest

from eval import page
from eval.common.files import write_json
from eval.datasets.benchmarks import DATASETS
from eval.segment.experiment import Experiment
from eval.segment.methods import METHODS


ROOT = Path(__file__).parents[1]
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
STRANGE = "refined <twice> & 'blurred'"
MAIN_TABLE = """
vanilla SD1.5        44.3 32.3 32.3 11.8 18.0
vanilla Flux         55.7 48.4 43.3 25.6 24.5
fttm    SD1.5        48.9 30.0 34.6 12.3 20.3
goca    SD1.5        60.7 40.4 39.2 16.1 22.0
goca    SDXL         65.6 42.3 44.3 21.2 23.2
goca    PixArt-Sigma 63.6 43.2 39.8 22.6 23.8
goca    Flux         70.7 51.1 48.1 27.1 29.3
"""


def result(benchmark, model, protocol, prompts, split, *rows):
    """A file of results; a row is (method, miou, images, whatever else it has)."""
    shared = {"benchmark": benchmark, "model": model, "protocol": protocol, "prompts": prompts, "seed": 3}
    usual = {"skipped": 0, "config": {}, "pixel_accuracy": 0.8125, "values": {"0.0": 0.5}, "reasons": {}, "iou": {}}
    return {
        "command": "python -m eval.segmentation a.toml > b",
        "experiment": {"split": split, "seed": 3, "background": {"kind": "offset"}},
        "versions": {"torch": "2.15.0", "diffusers": "0.42.1"},
        "commit": "80f7929abcde",
        "rows": [shared | usual | {"method": m, "miou": v, "images": n} | more for m, v, n, more in rows],
    }


def grid(heads, layers, rescale, miou):
    config = {"heads": heads, "layers": layers, "rescale": rescale}
    return ", ".join(f"{k} {v}" for k, v in config.items()), miou, 1464, {"config": {"base": "goca", **config}}


GAP = {"difference": 0.0312, "interval": "-0.0104 to +0.0728"}
SKIPPED = {"skipped": 2, "reasons": {"000007": "it shows no class & no <word>"}}
FILES = {
    "segment-scenes": result(
        "scenes", "tiny-sd", "standard", "tags", "test",
        ("vanilla", 0.7161, 300, {"iou": {"cat": 0.7037, "grass": None}}), ("goca", 0.7473, 300, GAP),
        (STRANGE, 0.7311, 298, SKIPPED | {"config": {"refine_order": 2}}),
    ),
    "segment-voc_sd15": result(
        "voc", SD15, "goca", "captions", "train",
        ("goca", 0.5448, 1462, SKIPPED | {"value": 0.2, "values": {"0.1": 0.5391, "0.2": 0.5448}}),
    ),
    "segment-voc_limited": result("voc", SD15, "goca", "captions", "train", ("vanilla", 0.4017, 20, {})),
    "segment-voc_standard": result("voc", SD15, "standard", "tags", "val", ("diffsegmenter", 0.5872, 1449, {})),
    "segment-voc_sd15_ablation": result(
        "voc", SD15, "goca", "captions", "train",
        grid("uniform", "uniform", False, 0.4219), grid("uniform", "uniform", True, 0.4986),
        grid("contribution", "uniform", False, 0.4341), grid("contribution", "uniform", True, 0.5123),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    for name, content in FILES.items():
        write_json(folder / f"{name}.json", content)
    write_json(folder / "speed-cpu.json", {"rows": "of another program"})
    page.write(folder, folder / "docs" / "page.html")
    return ElementTree.fromstring((folder / "docs" / "page.html").read_text(encoding="utf-8"))


def words(element):
    return " ".join("".join(element.itertext()).split())


def tables(tree, *said):
    """Tables whose caption says all that, as {row's header: {column's header: text}}, in the page's order."""
    found = []
    for table in tree.iter("table"):
        if all(word in words(table.find("caption")) for word in said):
            head = [words(cell) for cell in table.find("thead/tr")][1:]
            rows = [[words(cell) for cell in row] for row in table.find("tbody")]
            found.append({name: dict(zip(head, cells, strict=True)) for name, *cells in rows})
    return found


def test_nothing_comes_from_elsewhere(tree):
    assert not {"script", "link", "img", "iframe", "object"} & {element.tag for element in tree.iter()}
    for element in tree.iter():
        assert not {"src", "href", "onclick", "onload"} & set(element.keys())
    assert not re.search(r"url\(|@import|https?:", ElementTree.tostring(tree, encoding="unicode"))


def test_tables_say_what_their_headers_are(tree):
    found = list(tree.iter("table"))
    assert len(found) > len(FILES)
    for table in found:
        assert words(table.find("caption"))
        assert all(cell.tag == "th" and cell.get("scope") == "col" for cell in table.find("thead/tr"))
        for row in table.find("tbody"):
            assert [cell.tag for cell in row] == ["th"] + ["td"] * (len(row) - 1)
            assert row[0].get("scope") == "row"
            assert len(row) == len(table.find("thead/tr"))


def test_every_number_and_name_is_there(tree):
    rows = [cells | {"method": name} for each in tables(tree, "protocol") for name, cells in each.items()]
    for content in FILES.values():
        for row in content["rows"]:
            found = [cells for cells in rows if cells["method"] == row["method"] and "pixel accuracy" in cells]
            assert f"{100 * row['miou']:.1f}" in [cells["mIoU"] for cells in found]
            assert str(row["images"]) in [cells["images"] for cells in found]


def test_differences_and_settings_of_a_file(tree):
    rows = tables(tree, "tiny-sd", "scenes · test", "standard", "tags")[0]
    assert rows["vanilla"]["95 % interval"] == "–"
    assert rows["goca"]["95 % interval"] == "−1.0 to +7.3"
    assert [v for k, v in rows["goca"].items() if k.startswith("difference")] == ["+3.1"]
    assert rows[STRANGE]["changes"] == "refine_order 2"
    assert rows[STRANGE]["skipped"] == "2"


def test_plot_has_the_interval_to_scale(tree):
    (drawing,) = tree.iter("svg")
    assert drawing.get("role") == "img"
    assert "goca: +3.1 (−1.0 to +7.3)" in drawing.get("aria-label")
    left, right, zero = (
        float(x) for x in re.match(r"M([\d.]+) \d+H([\d.]+).*M([\d.]+) \d+v14", drawing.find("path").get("d")).groups()
    )
    unit = float(drawing.find("rect").get("width")) / 0.0312
    assert (right - left) / unit == pytest.approx(0.0104 + 0.0728, abs=1e-3)
    assert (zero - left) / unit == pytest.approx(0.0104, abs=1e-3)


def test_ours_beside_the_paper_with_the_difference(tree):
    (cells,) = tables(tree, "SD1.5", "protocol goca", "captions")[:1]
    whole, limited = "voctrain, 1464 images", "voctrain, 20 images"
    assert cells["goca"][whole] == (
        "54.5GoCA's paper 60.7 (−6.2)independent re-run 54.5 (+0.0)second re-run 55.0 (−0.5)"
    )
    assert cells["vanilla"][limited] == "40.2"
    assert cells["vanilla"][whole] == "–GoCA's paper 44.3"
    assert cells["goca"]["ade20kval, 2000 images"] == "–GoCA's paper 22.0"


def test_no_difference_from_another_protocol(tree):
    (cells,) = tables(tree, "SD1.5", "protocol standard")[:1]
    assert cells["diffsegmenter"] == {"vocval, 1449 images": "58.7DiffSegmenter's paper 60.1, own protocol"}


def test_parts_of_goca_beside_the_paper(tree):
    (cells,) = tables(tree, "Parts of GoCA")
    assert cells == {
        "uniform": {
            "uniform layersnot rescaled": "42.2GoCA's paper 44.3 (−2.1)",
            "uniform layersrescaled": "49.9GoCA's paper 52.6 (−2.7)",
        },
        "contribution": {
            "uniform layersnot rescaled": "43.4GoCA's paper 44.8 (−1.4)",
            "uniform layersrescaled": "51.2",
        },
    }


def test_classes_and_values(tree):
    (classes,) = tables(tree, "IoU of each class")
    assert (classes["cat"]["vanilla"], classes["grass"]["vanilla"], classes["cat"]["goca"]) == ("70.4", "–", "–")
    assert "--v:0.70" in [cell.get("style") for cell in tree.iter("td")]
    assert tables(tree, "each value") == [{"goca": {"0.1": "53.9", "0.2": "54.5"}}]


def test_how_it_was_made(tree):
    told = [words(entry) for entry in tree.iter("dd")]
    for said in ("python -m eval.segmentation a.toml > b", "80f7929abcde", "torch 2.15.0, diffusers 0.42.1", "3"):
        assert told.count(said) == len(FILES)
    skipped = tables(tree, "Skipped images")
    assert skipped[0] == {STRANGE: {"image": "000007", "reason": "it shows no class & no <word>"}}
    assert len(skipped) == 2


def test_the_tiny_model_is_called_what_it_is(tree):
    captions = [words(caption) for caption in tree.iter("caption")]
    for caption in captions:
        assert ("tiny-sd" in caption) == ("self-trained" in caption)
    assert sum("tiny-sd" in caption for caption in captions) == 2


def test_the_papers_numbers_are_there(tree):
    (quoted,) = [table for table in tree.iter("table") if words(table.find("caption")) == "Quoted numbers"]
    rows = [[words(cell) for cell in row] for row in quoted.find("tbody")]
    for number in tomllib.loads((ROOT / "eval/paper.toml").read_text())["number"]:
        method, model, benchmark, protocol = (number[k] for k in ("method", "model", "benchmark", "protocol"))
        percent = f"{100 * number['miou']:.1f}"
        assert [method, model, benchmark, percent, protocol, number["source"], number["remark"]] in rows


def test_paper_file():
    paper = tomllib.loads((ROOT / "eval/paper.toml").read_text())
    known = {*METHODS, *Experiment.read(ROOT / "configs/segment/voc_sd15_ablation.toml").rows}
    keys = [(n["method"], n["model"], n["benchmark"], n["source"]) for n in paper["number"]]
    assert len(set(keys)) == len(keys)
    for number in paper["number"]:
        assert 0 < number["miou"] < 1
        assert number["method"] in known
        assert number["benchmark"] in DATASETS
        assert number["protocol"] in paper["protocols"]
        assert number["protocol"] != "goca" or number["model"] in paper["models"]
    found = {key: n["miou"] for key, n in zip(keys, paper["number"], strict=True)}
    for method, model, *values in map(str.split, MAIN_TABLE.strip().splitlines()):
        for benchmark, value in zip(("voc", "context", "coco-object", "cityscapes", "ade20k"), values, strict=True):
            assert found[method, model, benchmark, "GoCA's paper"] == pytest.approx(float(value) / 100)


def test_no_results_is_one_error(tmp_path):
    with pytest.raises(ValueError, match=r"segment-\*\.json"):
        page.write(tmp_path, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_results_of_another_form_are_named(tmp_path):
    write_json(tmp_path / "segment-old.json", {"rows": [{"method": "goca", "mIoU": 71.2}]})
    with pytest.raises(ValueError, match=r"segment-old\.json"):
        page.write(tmp_path, tmp_path / "page.html")
