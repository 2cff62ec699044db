"""The commands, on the embedded model: what they write, what they print, how they fail."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import goca_guidance
from goca_guidance import cli, pictures
from goca_guidance.cli import main
from goca_guidance.doctor import kernel_lines
from goca_guidance.models import SCENE
from tests.helpers.families import stock_pipeline
from tests.helpers.interpreted import switched


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_generate(tmp_path, capsys):
    assert main(["generate", "a cat and a bus on grass", "--out", str(tmp_path), "--steps", "3"]) == 0
    assert names_in(tmp_path) == {"image.png", "regions.png", "strip.png", "guidance.gif"}
    assert Image.open(tmp_path / "image.png").size == (256, 256)
    assert Image.open(tmp_path / "guidance.gif").n_frames >= 3
    assert f"wrote {tmp_path}" in capsys.readouterr().out


def test_generate_plain(tmp_path):
    assert main(["generate", "a cat", "--out", str(tmp_path), "--steps", "2", "--no-scfg"]) == 0
    assert names_in(tmp_path) == {"image.png"}


def test_another_family(tmp_path):
    """Flux guides by another scale, and needs a negative prompt for it."""
    model, small = tmp_path / "model", ["--height", "32", "--width", "32", "--steps", "2"]
    stock_pipeline("flux").save_pretrained(model)
    generated, segmented = tmp_path / "generated", tmp_path / "segmented"
    assert main(["generate", "a cat on grass", *small, "--model", str(model), "--out", str(generated)]) == 0
    assert names_in(generated) == {"image.png", "regions.png", "strip.png", "guidance.gif"}
    classes = ["--classes", "cat", "potted plant"]
    assert main(["segment", str(SCENE), *classes, "--model", str(model), "--out", str(segmented)]) == 0
    assert Image.open(segmented / "labels.png").size == (64, 64)


def test_segment(tmp_path, capsys):
    command = [
        "segment",
        str(SCENE),
        "--classes",
        "sheep",
        "potted plant",
        "--background",
        "water",
        "--out",
        str(tmp_path),
    ]
    assert main(command) == 0
    labels = Image.open(tmp_path / "labels.png")
    assert labels.mode == "P"
    assert labels.size == (64, 64)
    assert set(np.unique(np.asarray(labels))) <= {0, 1, 2}
    assert "background" in capsys.readouterr().out


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Three pictures that can be read, and three that cannot."""
    folder = tmp_path / "photos"
    folder.mkdir()
    with Image.open(SCENE) as sample:
        for turned in range(3):
            sample.convert("RGB").transpose(Image.Transpose(turned)).save(folder / f"{turned}.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:900])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    Image.new("RGB", (80, 64)).save(folder / "huge.png")
    return folder


def test_a_folder_goes_on_after_a_kill_and_over_what_is_broken(photos, tmp_path, capsys, monkeypatch):
    out, replace = tmp_path / "out", Path.replace
    command = ["segment", str(photos), "--classes", "sheep", "water", "--out", str(out), "--batch-size", "2"]
    command += ["--formats", "labels", "coco"]

    def killed(self, target):
        if self.name == ".part-1":
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        assert main(command) == 130
    assert names_in(out) == {"0", ".part-1", "settings.json"}
    before = (out / "0").stat().st_mtime_ns
    capsys.readouterr()
    assert main(command) == 1
    said = capsys.readouterr()
    told = [line for line in re.split(r"[\r\n]+", said.err) if line.strip().startswith("goca: error")]
    assert [re.search(r"(\w+).png", line)[1] for line in told] == ["broken", "empty", "huge"]
    assert "at most 4,096 pixels" in told[2]
    assert re.findall(r"^wrote .*/(\d): sheep", said.out, re.M) == ["1", "2"]
    assert (out / "0").stat().st_mtime_ns == before
    assert names_in(out) == {"0", "1", "2", "settings.json", "coco.json"}
    assert len(json.loads((out / "coco.json").read_text())["images"]) == 3
    alone = tmp_path / "alone"  # equals what the picture is without any beside it
    assert main(["segment", str(photos / "2.png"), "--classes", "sheep", "water", "--out", str(alone)]) == 0
    assert (alone / "labels.png").read_bytes() == (out / "2" / "labels.png").read_bytes()
    assert main([*command, "--seed", "1"]) == 2
    assert "seed was 0 and is 1" in capsys.readouterr().err


def test_several_prompts(tmp_path, capsys):
    file, out = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("a bus\n\na cat\n")
    command = ["generate", "a cat", "--prompts-file", str(file), "--out", str(out), "--steps", "1", "--no-scfg"]
    assert main(command) == 0
    assert names_in(out) == {"a-cat", "a-bus", "settings.json"}
    assert names_in(out / "a-bus") == {"image.png"}
    assert main(command) == 0
    assert "2 of 2 are finished" in capsys.readouterr().err


def test_every_option_tells_its_default():
    parser = cli._parser()
    commands = next(action for action in parser._actions if action.dest == "COMMAND" or action.choices)
    for name, sub in commands.choices.items():
        for action in sub._actions:
            if action.option_strings and action.dest != "help" and not action.required:
                assert "default" in sub._get_formatter()._get_help_string(action), (name, action.dest)


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.strip() == f"goca {goca_guidance.__version__}"


def test_demo_draws_six_pictures(tmp_path):
    assert main(["demo", "--out", str(tmp_path)]) == 0
    expected = {"image.png", "regions.png", "strip.png", "guidance.gif", "comparison.png", "segmentation.png"}
    assert names_in(tmp_path) == expected


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "attention, scaled dot product (the default): works" in printed
    assert "attention slicing: hidden" in printed
    assert "fused kernels: they can" in printed


def test_doctor_says_whether_fused_kernels_are_on():
    with switched(None):
        (line,) = (line for line in kernel_lines() if "kernels: off" in line)
        assert line.startswith(
            "fused kernels: off: GOCA_TRITON=1 turns them on; an H200 found an earlier form of them right, and"
        )
    with switched("1"):
        assert "fused kernels: on" in kernel_lines()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", ""], "at least one word"),
        (["generate", "a cat", "--height", "33", "--width", "64"], "divisible by 8"),
        (["generate", "a cat", "--height", "64"], "both --height and --width"),
        (["generate", "a cat", "--dtype", "float99"], "Expected `--dtype` to be one of 'float32', 'fp32'"),
        (["generate"], "Expected a prompt, or a file of them"),
        (["generate", "--prompts-file", "nowhere.txt"], "nowhere.txt"),
        (["segment", str(SCENE), "--classes", "cat", "--formats", "png"], "Expected `--formats[0]` to be one of"),
        (["segment", str(SCENE), "--classes", "cat", "--batch-size", "0"], "Expected `--batch-size` to be a whole"),
        (["segment", "*.nothing", "--classes", "cat"], "Expected pictures in '*.nothing'"),
        (["generate", "a cat", "--steps", "0"], "Expected `--steps` to be a whole number of at least 1"),
        (["generate", "a cat", "--steps", "0", "--no-scfg"], "Expected `--steps` to be a whole number of at least 1"),
        (["generate", "a cat", "--guidance-scale", "nan"], "Expected `--guidance-scale` to be a finite number"),
        (["generate", "a cat", "--seed", str(2**70)], "Expected `--seed` to be a whole number"),
        (["generate", "a cat", "--device", "nowhere"], "nowhere"),
        (
            ["segment", str(SCENE), "--classes", "cat", "--threshold", "nan"],
            "Expected `--threshold` to be a finite number",
        ),
        (["segment", str(SCENE), "--classes", "cat", "--num-noises", "0"], "Expected `--num-noises` to be a whole"),
        (["segment", "nowhere.png", "--classes", "cat"], "readable image file"),
        (["segment", str(SCENE), "--classes", "cat", "--prompt", "a dog"], "'cat' among the words"),
        (["generate", "a cat", "--model", "no/such-folder"], "no/such-folder"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(command, message, tmp_path, capsys):
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("goca: error: ")
    assert message in last
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["generate", "segment"])
def test_a_file_is_no_folder(command, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    given = {"generate": ["a cat"], "segment": [str(SCENE), "--classes", "cat"]}[command]
    assert main([command, *given, "--out", str(tmp_path / "out")]) == 2
    assert "Expected --out to be a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--classes", "cat"], True),
        (["--classes", "cat", "--threshold", "0.5"], False),
        (["--classes", "cat", "--background", "grass"], False),
        (["--classes", "cat", "bus"], False),
    ],
)
def test_one_class_without_a_background_is_told(given, told, tmp_path, capsys):
    assert main(["segment", str(SCENE), *given, "--out", str(tmp_path)]) == 0
    error = capsys.readouterr().err
    assert ("goca: note: one class without a background wins everywhere" in error) is told


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("an astronaut riding a horse", "astronaut, riding"),
        ("A photo of a cat, and a potted plant on grass!", None),
        ("I saw 3 cats", "i, saw, 3, cats"),
    ],
)
def test_words_that_the_embedded_model_does_not_know_are_told(prompt, unknown, tmp_path, capsys):
    assert main(["generate", prompt, "--out", str(tmp_path), "--steps", "1"]) == 0
    error = capsys.readouterr().err
    assert ("goca: note: the embedded model does not know" in error) is (unknown is not None)
    assert unknown is None or f"know {unknown}, and" in error


def test_a_picture_that_cannot_be_drawn_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"not supported"):
        pictures.save(pictures.comparison([Image.new("RGB", (8, 8))], ["a"]), tmp_path / "a.nothing")
    assert names_in(tmp_path) == set()


def test_colours_are_distinct():
    assert len({pictures.colour(i) for i in range(20)}) == 20
