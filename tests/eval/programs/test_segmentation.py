"""The segmentation program: rows, resuming, processes, prompts written and read, and what cannot be counted."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval import segmentation
from eval.common.configs import from_mapping
from eval.datasets.benchmarks import benchmark
from eval.prompts.prompt_file import write_prompts
from eval.prompts.sources import Entity, Prompt
from eval.segment import experiment, methods, running
from eval.segment.confusion import Counts
from eval.segment.experiment import Experiment
from goca_guidance import Background, GoCAConfig
from tests.helpers.miniatures import miniature, relist
from tests.helpers.processes import forked


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, tiny):
    """Runs of their own, in chunks of two images, on a model that is loaded once."""
    monkeypatch.setattr(running, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(running, "CHUNK", 2)
    monkeypatch.setattr(running, "load_pipeline", lambda *args: tiny)


def scenes(limit=4, batch=3, **changes):
    return Experiment(**{"methods": {"vanilla": {}, "goca": {}}, "limit": limit, "batch": batch} | changes)


UP = ["up_blocks.1"]
NAMED = {  # what the papers choose for Stable Diffusion alone
    "manual": {"layers": UP},
    "fttm": {"layers": UP},
    "fttm-paper": {"num_noises": 1, "text_layers": UP, "self_layer": "up_blocks.2.attentions.0"},
    "diffsegmenter": {"grid_weights": [0.3, 0.5, 0.1]},
}


@pytest.mark.parametrize("name", NAMED)
def test_a_row_names_the_layers_of_a_model_that_its_paper_does_not_know(name):
    with pytest.raises(ValueError, match=r"Expected a model whose layers|Expected Stable Diffusion 1\.x") as caught:
        running.result(scenes(methods={name: {}}))
    assert "\n" not in str(caught.value)


def test_every_method_has_a_row():
    found = running.result(scenes(methods={name: {} for name in methods.METHODS} | NAMED))
    rows = {row["method"]: row for row in found["rows"]}
    assert set(rows) == set(methods.METHODS)
    assert all(0.1 < row["miou"] <= 1 and row["images"] == 4 for row in rows.values())
    assert len({row["miou"] for row in rows.values()}) > 4
    assert "difference" not in rows["goca"]
    assert {"method", "model", "benchmark", "protocol", "miou", "config", "seed", "images"} <= set(rows["goca"])
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert json.loads(json.dumps(found)) == found


def test_settings_that_a_method_has_of_its_own(tiny):
    """DiffSegmenter's sentence: the model reads it, class by class."""
    read, real = [], type(tiny).segment
    weights = NAMED["diffsegmenter"]
    changed = experiment.method_of("diffsegmenter", {"template": "an image of {} there", **weights})
    prompts = [[Prompt("cat, grass", (Entity("cat", 2), Entity("grass", 16)))]]
    image = experiment.images_of(scenes()).read("000000")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tiny), "segment", lambda self, *a, **k: read.append(k["prompt"]) or real(self, *a, **k))
        names = experiment.images_of(scenes()).classes
        (scores,) = changed.answer(
            tiny, methods.Batch([image], prompts, [0], names), changed.config, 8, **changed.extra
        )
    assert read == [[f"an image of {names[2]} there", f"an image of {names[16]} there"]]
    assert scores.labels == (2, 16)
    with pytest.raises(ValueError, match="a key of GoCAConfig, but got `template`: known are"):
        experiment.method_of("goca", {"template": "{}"})


def test_words_answer_as_single_images_do(tiny):
    """In batches, over several prompts of one image, two entities of one class; each map once, the highest counts."""
    images = [experiment.images_of(scenes()).read(i)[0] for i in ("000000", "000001")]
    prompts = [
        [Prompt("cat, kitten, grass", (Entity("cat", 2), Entity("kitten", 2), Entity("grass", None)))],
        [Prompt("dog, sky", (Entity("dog", 5), Entity("sky", 9))), Prompt("bus", (Entity("bus", 1),))],
    ]
    batch = methods.Batch(images, prompts, [3, 4], ())
    first, second = methods.by_words(tiny, batch, GoCAConfig(), 2)

    def alone(image, seed, prompt):
        names = [entity.words for entity in prompt.entities]
        generator = [torch.Generator().manual_seed(seed)]
        return tiny.segment(image, names, prompt=prompt.text, generator=generator).scores[0]

    cat, kitten, grass = alone(images[0], 3, prompts[0][0])
    assert (first.labels, second.labels) == ((2,), (1, 5, 9))
    assert torch.allclose(first.maps[0], torch.maximum(cat, kitten), atol=1e-3)
    assert torch.allclose(first.background, grass, atol=1e-3)
    dog, sky = alone(images[1], 4, prompts[1][0])
    assert torch.allclose(second.maps[1:], torch.stack([dog, sky]), atol=1e-3)
    assert torch.allclose(second.maps[0], alone(images[1], 4, prompts[1][1])[0], atol=1e-3)
    assert not second.background.any()


@pytest.mark.parametrize("merged", [True, False])
def test_background_words_are_background_entities(tiny, merged):
    """In the released order one map of all of them, else the highest of their scores; an image without any has zeros."""
    images = [experiment.images_of(scenes()).read(i)[0] for i in ("000000", "000001", "000002")]
    prompts = [
        [Prompt("cat, sky, grass", (Entity("sky", None), Entity("cat", 2), Entity("grass", None)))],
        [Prompt("dog", (Entity("dog", 5),))],
        [Prompt("sand, bus", (Entity("bus", 1), Entity("sand", None))), Prompt("sky", (Entity("sky", None),))],
    ]
    found = methods.by_words(tiny, methods.Batch(images, prompts, [3, 4, 5], (), merged), GoCAConfig(), 8)
    given = {"prompt": "cat, sky, grass", "generator": [torch.Generator().manual_seed(3)]}
    alone = tiny.segment(images[0], ["cat"], background=Background(("sky", "grass"), merged=merged), **given)
    assert [scores.labels for scores in found] == [(2,), (5,), (1,)]
    assert torch.allclose(found[0].background, alone.entities[0].amax(0), atol=1e-3)
    assert torch.allclose(found[0].maps, alone.scores[0], atol=1e-3)
    assert not found[1].background.any()
    seed = [torch.Generator().manual_seed(5)]
    sky = tiny.segment(images[2], ["sky"], prompt="sky", generator=seed).scores[0, 0]
    sand = tiny.segment(images[2], ["bus", "sand"], prompt="sand, bus", generator=[torch.Generator().manual_seed(5)])
    assert torch.allclose(found[2].background, torch.maximum(sand.scores[0, 1], sky), atol=1e-3)


def test_order_of_the_background_is_told_and_matters():
    rules = {f"merged {m}": {"kind": "offset", "values": [0.0, 0.2], "merged": m} for m in (True, False)}
    rows = {name: {"base": "goca", "background": rule} for name, rule in rules.items()}
    found = running.result(scenes(12, benchmark="scenes-animals", protocol="goca", methods=rows))["rows"]
    assert [row["effective"]["background"] for row in found] == [
        {"kind": "offset", "merged": m} for m in (True, False)
    ]
    assert found[0]["values"] != found[1]["values"]
    assert all(0.2 < row["miou"] < 1 and row["images"] == 12 for row in found)


def test_a_killed_run_goes_on(monkeypatch):
    whole = running.result(scenes(limit=6))
    monkeypatch.setattr(running, "RUNS", running.RUNS.parent / "again")
    save, saved = Counts.save, []

    def killed(self, path):
        if len(saved) == 4:
            raise KeyboardInterrupt
        saved.append(path)
        save(self, path)

    monkeypatch.setattr(Counts, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        running.result(scenes(limit=6))
    done = {path: path.read_bytes() for path in saved}
    monkeypatch.setattr(Counts, "save", save)
    assert running.result(scenes(limit=6)) == whole
    assert {path: path.read_bytes() for path in saved} == done
    monkeypatch.setattr(running.SegmentationRun, "measure", lambda *a: pytest.fail("measured again"))
    assert running.result(scenes(limit=6)) == whole


@pytest.mark.parametrize("damage", ["empty", "cut", "bytes", "others", "folder"])
def test_damaged_counts_are_told_and_measured_again(damage, capsys):
    whole = running.result(scenes())
    paths = sorted(running.RUNS.rglob("*.npz"))
    assert len(paths) == 4
    before, other = paths[0].read_bytes(), next(p for p in paths[1:] if p.parent == paths[0].parent).read_bytes()
    flipped = bytes([before[len(before) // 2] ^ 255])
    content = {"empty": b"", "cut": before[:-30], "others": other, "folder": b"",
               "bytes": before[: len(before) // 2] + flipped + before[len(before) // 2 + 1 :]}[damage]  # fmt: skip
    paths[0].unlink()
    if damage == "folder":
        paths[0].mkdir()
        with pytest.raises(ValueError, match=f"{paths[0].name} to be a file, or not to be there"):
            running.result(scenes())
        paths[0].rmdir()
    else:
        paths[0].write_bytes(content)
        assert running.result(scenes()) == whole
        assert f"{paths[0]} is damaged and is made again" in capsys.readouterr().out
    assert running.result(scenes()) == whole


def test_two_processes_count_the_same(tmp_path, monkeypatch):
    """Each process counts some of the images, and the sums are exactly those of one."""
    config = tmp_path / "config.toml"
    config.write_text(
        'limit = 6\nbatch = 4\n[methods.vanilla]\n[methods."no refinement"]\nbase = "goca"\nrefine_order = 0\n'
    )
    monkeypatch.setattr(running, "RUNS", Path("runs"))
    results, shares = {}, {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        told = forked(count, lambda: segmentation.main([str(config), "--result", "result.json"]), folder)
        shares[count] = [re.findall(r"vanilla: 100%\D+(\d+)/", each)[-1] for each in told]
        results[count] = json.loads((folder / "result.json").read_text())
    assert results[1]["rows"] == results[2]["rows"]
    assert shares == {1: ["6"], 2: ["4", "2"]}
    assert [row["images"] for row in results[2]["rows"]] == [6, 6]


def test_prompts_are_written_and_read(tmp_path):
    config, prompts = tmp_path / "config.toml", tmp_path / "prompts.jsonl"
    config.write_text("limit = 3\n[methods.goca]\n")
    segmentation.main([str(config), "--write-prompts", str(prompts)])
    assert len(prompts.read_text().splitlines()) == 3
    read = running.result(scenes(limit=3, prompts={"source": "written", "path": str(prompts)}))
    assert [row["iou"] for row in read["rows"]] == [row["iou"] for row in running.result(scenes(limit=3))["rows"]]


def test_the_vocabulary_in_chunks():
    """Every class is asked for, so pixels can be of classes that the image does not show."""
    found = running.result(scenes(methods={"goca": {}}, prompts={"source": "vocabulary", "chunk": 6}))["rows"][0]
    assert 0 < found["miou"] < running.result(scenes(methods={"goca": {}}))["rows"][0]["miou"]


# ---- benchmarks with a background ------------------------------------------------------------------------------------
@pytest.fixture
def voc(tmp_path):
    miniature("voc", tmp_path / "voc", "val")
    miniature("voc", tmp_path / "voc", "train")
    return {"benchmark": "voc", "root": str(tmp_path / "voc"), "limit": None}


def test_one_forward_serves_all_values(voc, monkeypatch, tiny):
    calls, real = [], type(tiny).segment
    monkeypatch.setattr(type(tiny), "segment", lambda self, *a, **k: calls.append(1) or real(self, *a, **k))
    values = [0.0, 0.2, 0.5, 2.0]
    found = running.result(scenes(**voc, protocol="goca", background={"kind": "offset", "values": values}))["rows"]
    assert len(calls) == 2 * 2  # three images in chunks of two
    for row in found:
        assert list(row["values"]) == [str(value) for value in values]
        assert row["miou"] == max(row["values"].values()) == row["values"][str(row["value"])]
    single = running.result(scenes(**voc, protocol="goca", background={"kind": "offset", "values": [0.5]}))["rows"]
    assert [row["values"]["0.5"] for row in single] == [row["values"]["0.5"] for row in found]


def test_training_images_choose_the_value_of_the_standard_protocol(voc):
    background = {"kind": "offset", "values": [0.0, 0.3, 2.0]}
    with pytest.raises(ValueError, match="`tune` training images"):
        running.result(scenes(**voc, background=background))
    (cut,) = running.result(scenes(**voc, background=background, tune=1, methods={"diffcut": {}}))["rows"]
    assert "value" not in cut  # it has no rule, and no value to choose
    ids = benchmark("voc", voc["root"]).ids
    for split, chosen, box in (("train", ids[:1], (1, 0)), ("val", ids[1:], (0, 0))):
        relist(next(Path(voc["root"]).rglob(f"Segmentation/{split}.txt")), chosen)
        for name in chosen:  # the training image is nearly all background, the others are all dog
            path = next(Path(voc["root"]).rglob(f"{name}.png"))
            mask = Image.open(path)
            mask.paste(12, (0, 0, *mask.size))
            mask.paste(0 if split == "train" else 12, (*box, *mask.size))
            mask.save(path)
    found = running.result(scenes(**voc, background=background, tune=1))["rows"][1]
    assert max(found["values"], key=found["values"].get) == "0.0"
    assert found["value"] == 2.0
    assert found["miou"] == found["values"]["2.0"]
    with pytest.raises(ValueError, match="another split than the training"):
        running.result(scenes(**voc, background=background, tune=1, split="train"))


def test_what_cannot_be_counted_is_told(voc, tmp_path):
    ids = benchmark("voc", voc["root"]).ids
    broken, empty = (next((tmp_path / "voc").rglob(f"{i}.png")) for i in ids[:2])
    whole = broken.read_bytes()
    broken.write_bytes(b"not a picture")
    shape = np.asarray(Image.open(empty)).shape
    Image.fromarray(np.zeros(shape, np.uint8)).save(empty)  # an image without a class counts as background
    rule = {"kind": "constant", "values": [0.4]}
    row = running.result(scenes(**voc, background=rule))["rows"][0]
    assert (row["images"], row["skipped"]) == (len(ids) - 1, 1)
    assert list(row["reasons"]) == [ids[0]]
    broken.write_bytes(whole)  # and it is counted when it was mended
    assert running.result(scenes(**voc, background=rule))["rows"][0]["skipped"] == 0


def test_an_image_without_a_class_to_ask_for_is_background(voc, tmp_path):
    """Its objects are missed, and its forward is saved; without a background there is nothing to say."""
    prompts = tmp_path / "prompts.jsonl"
    ids = benchmark("voc", voc["root"]).ids
    lines = [{"id": i, "prompts": [{"text": "sky", "entities": [{"words": "sky", "class": None}]}]} for i in ids]
    lines[0]["prompts"] = []
    prompts.write_text("\n".join(map(json.dumps, lines)))
    row = running.result(scenes(**voc, prompts={"source": "written", "path": str(prompts)}))["rows"][1]
    masks = np.stack([benchmark("voc", voc["root"]).read(i)[1] for i in ids])
    assert (row["images"], row["skipped"]) == (len(ids), 0)
    assert row["pixel_accuracy"] == pytest.approx((masks == 0).sum() / (masks != 255).sum(), abs=1e-4)


def test_changed_prompts_are_measured_again(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = []
    for name in ("cat", "bus"):
        entities = [{"words": name, "class": name}, {"words": "grass", "class": "grass"}]
        path.write_text(json.dumps({"id": "000000", "prompts": [{"text": f"{name}, grass", "entities": entities}]}))
        rows += running.result(scenes(limit=1, prompts={"source": "written", "path": str(path)}))["rows"][1:]
    assert rows[0]["iou"] != rows[1]["iou"]


def test_classes_of_written_prompts_are_names(tmp_path):
    """The protocol of GoCA counts one class more, before the others."""
    miniature("ade20k", tmp_path / "ade", "val")
    ade = {"benchmark": "ade20k", "root": str(tmp_path / "ade"), "limit": None, "methods": {"goca": {}}}
    experiments = [scenes(**ade, protocol=protocol) for protocol in ("standard", "goca")]
    run = running.SegmentationRun(experiments[0])
    write_prompts(tmp_path / "p.jsonl", segmentation.prompts_of(run), run.images.classes)
    given = {"source": "written", "path": str(tmp_path / "p.jsonl")}
    read = running.result(scenes(**ade, protocol="goca", prompts=given))["rows"][0]
    assert read["iou"] == running.result(experiments[1])["rows"][0]["iou"]


def test_what_no_image_is_at_fault_for_stops_the_run(monkeypatch, tiny):
    tried = []

    def refuse(self, *args, **kwargs):
        tried.append(1)
        raise ValueError("Expected height and width divisible by 8.")

    monkeypatch.setattr(type(tiny), "segment", refuse)
    with pytest.raises(ValueError, match="divisible by 8"):
        running.result(scenes(limit=20))
    assert len(tried) == 3  # a batch, and its two images


def test_prompts_are_written_for_what_can_be_read(voc, tmp_path):
    ids = benchmark("voc", voc["root"]).ids
    next((tmp_path / "voc").rglob(f"{ids[0]}.png")).write_bytes(b"not a picture")
    found = segmentation.prompts_of(running.SegmentationRun(scenes(**voc)))
    assert sorted(found) == sorted(ids[1:])


def test_one_prompt_that_is_too_long_costs_one_image(tmp_path):
    long = tmp_path / "prompts.jsonl"
    config = tmp_path / "config.toml"
    config.write_text("limit = 3\n[methods.goca]\n")
    segmentation.main([str(config), "--write-prompts", str(long)])
    lines = [json.loads(line) for line in long.read_text().splitlines()]
    lines[1]["prompts"][0]["text"] = "photo, " * 90 + lines[1]["prompts"][0]["text"]
    long.write_text("\n".join(map(json.dumps, lines)))
    row = running.result(scenes(limit=3, prompts={"source": "written", "path": str(long)}))["rows"][0]
    assert (row["images"], row["skipped"]) == (2, 1)
    assert "shorten the prompt" in row["reasons"]["000001"]


def test_nothing_to_count_is_an_error(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "000000", "prompts": []}\n')
    with pytest.raises(ValueError, match="1 were skipped: no class is asked for"):
        running.result(scenes(limit=1, prompts={"source": "written", "path": str(prompts)}))


# ---- the file --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scenes": 3}, "a key of Experiment, but got `scenes`"),
        ({"method": {"goca": {}}}, "got `method`: write `methods`"),
        ({"methods": {}}, "at least one method"),
        ({"methods": {"goca": {"head": 1}}}, "the row 'goca': .* got `head`: write `heads`"),
        (
            {"methods": {"goca": {"blur_sigma": float("nan")}}},
            "`blur_sigma` to be a finite number above 0, but got nan",
        ),
        ({"methods": {"goca": {"refine_order": 1.5}}}, "`refine_order` to be a whole number"),
        ({"methods": {"goca": {"timestep": "x"}}}, "the row 'goca': .*`timestep` to be a whole number"),
        ({"methods": {"goca": {"num_noises": 0}}}, "`num_noises` to be a whole number of at least 1"),
        ({"methods": {"goca": {"background": [0.2]}}}, "the row 'goca': .*`background` to be a mapping"),
        ({"methods": {"diffsegmenter": {"template": 3}}}, "`template` to be a text, but got 3"),
        ({"methods": {"diffcut": {"threshold": "x"}}}, "`threshold` to be a finite number"),
        ({"methods": ["goca"]}, "`methods` to be a mapping"),
        ({"methods": {"goca": 3}}, r"`methods\['goca'\]` to be a mapping"),
        ({"grid": {"heads": "uniform"}}, r"`grid\['heads'\]` to be a non-empty list"),
        ({"grid": {"heads": []}}, r"`grid\['heads'\]` to be a non-empty list"),
        ({"grid": {"heads": ["uniform", 3]}}, "the row 'heads 3': "),
        ({"methods": {"goca": {"base": "gocha"}}}, "with a `base`, among"),
        ({"methods": {"vanila": {}}}, "got 'vanila'"),
        ({"protocol": "mine"}, "`protocol` to be one of 'standard', 'goca', but got 'mine'"),
        ({"batch": 0}, "`batch` to be a whole number of at least 1"),
        ({"prompts": {"source": "guess"}}, "`source` to be one of 'tags', .*, but got 'guess'"),
        ({"prompts": {"source": "captions"}}, "prompts of the source 'captions': .*missing .*'path'"),
        ({"prompts": {"source": "tags", "path": "x"}}, "prompts of the source 'tags': .* got `path`"),
        (
            {"prompts": {"source": "vocabulary", "chunk": 2.5}},
            "`chunk` to be a whole number of at least 1, but got 2.5",
        ),
        ({"prompts": {"source": "captions", "path": 3}}, "`path` to be .*, but got 3"),
        ({"prompts": "tags"}, "`prompts` to be a mapping"),
        ({"background": {"kind": "offset"}}, "a background such as"),
        ({"background": {"kind": "offset", "values": 0.2}}, "`values` to be a non-empty list of finite numbers"),
        (
            {"background": {"kind": "offset", "values": [float("inf")]}},
            r"`values\[0\]` to be a finite number, but got inf",
        ),
        ({"background": {"kind": "offset", "values": [0.3, 0.2]}}, "`values` in ascending order"),
        ({"background": {"kind": "ofset", "values": [0.2]}}, "`kind` to be one of 'offset'"),
        ({"background": {"kind": "offset", "value": [0.2]}}, "a background such as"),
        ({"dtype": "fp16"}, "`dtype` to be one of"),
        ({"num_noises": True}, "`num_noises` to be a whole number"),
        ({"limit": "3"}, "`limit` to be a whole number"),
        ({"tune": -1}, "`tune` to be a whole number of at least 0"),
        ({"timestep": "x"}, "`timestep` to be a whole number"),
    ],
)
def test_mistakes_in_the_file(changes, message):
    with pytest.raises(ValueError, match=message):
        running.result(from_mapping(Experiment, {"methods": {"goca": {}}, "limit": 1} | changes))


def test_pictures_of_the_best_and_the_worst(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.toml").write_text("limit = 3\n[methods.goca]\n[methods.diffcut]\n")
    segmentation.main(["config.toml", "--pictures", "1", "--result", "result.json"])
    assert json.loads((tmp_path / "result.json").read_text())["rows"][0]["images"] == 3
    names = {path.name for path in (tmp_path / "runs" / "pictures").glob("*.png")}
    assert names == {f"scenes-{method}-{kind}.png" for method in ("goca", "diffcut") for kind in ("best", "worst")}
