"""The commands, on the embedded model: what they write, what they print, how they fail."""

import numpy as np
import pytest
from PIL import Image

from goca_guidance import pictures
from goca_guidance.cli import SAMPLE, main
from goca_guidance.doctor import kernel_lines
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
    assert main(["segment", str(SAMPLE), *classes, "--model", str(model), "--out", str(segmented)]) == 0
    assert Image.open(segmented / "labels.png").size == (64, 64)


def test_segment(tmp_path, capsys):
    command = [
        "segment",
        str(SAMPLE),
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
        assert "fused kernels: off: GOCA_TRITON=1 turns them on, which no GPU has confirmed yet" in kernel_lines()
    with switched("1"):
        assert "fused kernels: on" in kernel_lines()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", ""], "at least one word"),
        (["generate", "a cat", "--height", "33", "--width", "64"], "divisible by 8"),
        (["generate", "a cat", "--height", "64"], "both --height and --width"),
        (["generate", "a cat", "--dtype", "float99"], "--dtype"),
        (["generate", "a cat", "--steps", "0"], "Expected `--steps` to be a whole number of at least 1"),
        (["generate", "a cat", "--steps", "0", "--no-scfg"], "Expected `--steps` to be a whole number of at least 1"),
        (["generate", "a cat", "--guidance-scale", "nan"], "Expected `--guidance-scale` to be a finite number"),
        (["generate", "a cat", "--seed", str(2**70)], "Expected `--seed` to be a whole number"),
        (["generate", "a cat", "--device", "nowhere"], "nowhere"),
        (
            ["segment", str(SAMPLE), "--classes", "cat", "--threshold", "nan"],
            "Expected `--threshold` to be a finite number",
        ),
        (["segment", str(SAMPLE), "--classes", "cat", "--num-noises", "0"], "Expected `--num-noises` to be a whole"),
        (["segment", "nowhere.png", "--classes", "cat"], "readable image file"),
        (["segment", str(SAMPLE), "--classes", "cat", "--prompt", "a dog"], "'cat' among the words"),
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
    given = {"generate": ["a cat"], "segment": [str(SAMPLE), "--classes", "cat"]}[command]
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
    assert main(["segment", str(SAMPLE), *given, "--out", str(tmp_path)]) == 0
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
