"""The programs: mIoU against torchmetrics, results that are whole or absent, training that resumes exactly."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torchmetrics.functional.classification import multiclass_jaccard_index

from eval import report, segmentation, train_tiny
from eval.scenes import CLASSES
from tests.tiny import tiny_components


def test_miou_is_the_dataset_level_jaccard_index():
    g = torch.Generator().manual_seed(0)
    truth, prediction = (torch.randint(len(CLASSES), (5, 30, 30), generator=g) for _ in range(2))
    matrices = np.stack(
        [
            segmentation.multiclass_confusion_matrix(p, t, num_classes=len(CLASSES)).numpy()
            for p, t in zip(prediction, truth, strict=True)
        ]
    )
    expected = multiclass_jaccard_index(prediction, truth, num_classes=len(CLASSES), average="macro")
    assert np.nanmean(segmentation.iou(matrices.sum(0))) == pytest.approx(100 * expected.item(), abs=1e-3)


def test_iou_by_hand():
    """Class 0: 2 right of 2 + 1; class 1: 1 right of 1 + 1; class 2 occurs nowhere."""
    each = segmentation.iou(np.array([[2, 0, 0], [1, 1, 0], [0, 0, 0]]))
    assert each[:2] == pytest.approx([100 * 2 / 3, 50])
    assert np.isnan(each[2])


def test_interval_of_no_difference_is_zero():
    matrices = np.random.default_rng(0).integers(0, 9, (6, 3, 3))
    assert segmentation.interval(matrices, matrices) == (0, 0)


def test_replacing_leaves_the_old_file_after_a_failure(tmp_path):
    path = tmp_path / "a.json"
    report.write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), report.replacing(path) as part:
        part.write_text(f"half {1 / 0}")
    assert json.loads(path.read_text()) == {"a": 1}


def test_tables_are_filled_in(tmp_path):
    report.write_json(
        tmp_path / "t.json", {"command": "python -m x", "rows": [{"method": "all", "mIoU": 1.5, "settings": {}}]}
    )
    text = report.fill("before\n<!-- results: t -->\nold\n<!-- end -->\nafter", tmp_path)
    assert "| all | 1.5 |" in text
    assert "`python -m x`" in text
    assert "old" not in text
    assert report.fill(text, tmp_path) == text


def test_segmentation_program(tmp_path, monkeypatch, pipe):
    """A run, its result, and a second run that reads what the first one measured."""
    pipe.components["tokenizer"].model_max_length = 24
    calls = []
    monkeypatch.setattr(segmentation, "load", lambda model: pipe)
    real = segmentation.confusions
    monkeypatch.setattr(segmentation, "confusions", lambda *a: calls.append(a) or real(*a))
    experiment = segmentation.Experiment({"vanilla": {"heads": "uniform"}, "all": {}}, scenes=2, model="none")
    rows = segmentation.run(experiment, tmp_path)
    assert [row["method"] for row in rows] == ["vanilla", "all"]
    assert 0 <= rows[1]["mIoU"] <= 100
    assert rows[0]["difference"] == 0
    assert segmentation.run(experiment, tmp_path) == rows
    assert len(calls) == 2


def test_unknown_setting_is_an_error():
    with pytest.raises(ValueError, match="among"):
        segmentation.from_mapping(segmentation.Experiment, {"scene": 3})


# ---- training --------------------------------------------------------------------------------------------------------
def arguments(tmp_path, stage, steps):
    return [
        stage,
        "--run",
        str(tmp_path),
        "--scenes",
        "16",
        "--batch",
        "2",
        "--every",
        "2",
        "--mixed-precision",
        "no",
        "--steps",
        steps,
    ]


def test_training_resumes_exactly_and_exports(tmp_path, monkeypatch):
    """A run killed after its first checkpoint and started again ends with the very weights of an unbroken one."""
    monkeypatch.setattr(train_tiny, "build_vae", tiny_vae)
    monkeypatch.setattr(train_tiny, "build_unet", lambda: tiny_components(cross_attention_dim=64)["unet"])
    log = train_tiny.Stage._log

    def killed(stage, *row):
        log(stage, *row)
        raise KeyboardInterrupt

    for run, kill in (("whole", False), ("killed", True)):
        for stage in ("vae", "unet"):
            if kill:
                monkeypatch.setattr(train_tiny.Stage, "_log", killed)
                with pytest.raises(KeyboardInterrupt):
                    train_tiny.main(arguments(tmp_path / run, stage, "4"))
                monkeypatch.setattr(train_tiny.Stage, "_log", log)
            train_tiny.main(arguments(tmp_path / run, stage, "4"))
    whole, resumed = (
        load_file(tmp_path / run / "unet" / "checkpoint" / "model.safetensors") for run in ("whole", "killed")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    rows = (tmp_path / "killed" / "unet" / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "2", "4"]
    train_tiny.main(["export", "--run", str(tmp_path / "whole"), "--out", str(tmp_path / "out")])
    assert train_tiny.StableDiffusionPipeline.from_pretrained(tmp_path / "out").unet.dtype == torch.float32
    assert not list(tmp_path.glob(".part-*"))


def tiny_vae():
    return train_tiny.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 8, 8),
        layers_per_block=1, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip


def test_every_caption_word_is_one_token():
    tokenizer = train_tiny.clip_tokenizer(train_tiny.caption_words())
    assert all(len(tokenizer.tokenize(word)) == 1 for word in train_tiny.caption_words())
    assert len(tokenizer.tokenize("zebra")) > 1
