"""The programs: results that are whole or absent, training that resumes exactly."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from eval import report, train_tiny
from eval.common import files
from tests.tiny import tiny_components


def test_replacing_leaves_the_old_file_after_a_failure(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), files.replacing(path) as part:
        part.write_text(f"half {1 / 0}")
    assert json.loads(path.read_text()) == {"a": 1}


def test_the_command_of_a_module_and_of_a_script(tmp_path):
    (tmp_path / "script.py").write_text("from eval.common.provenance import command\nprint(command())\n")
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    for arguments, expected in (
        (["script.py", "a b"], "python script.py 'a b'"),
        (["-m", "script", "1"], "python -m script 1"),
    ):
        told = subprocess.check_output([sys.executable, *arguments], cwd=tmp_path, env=environment, text=True)
        assert told.strip() == expected


def test_tables_are_filled_in(tmp_path):
    files.write_json(
        tmp_path / "t.json", {"command": "python -m x", "rows": [{"method": "all", "mIoU": 1.5, "settings": {}}]}
    )
    text = report.fill("before\n<!-- results: t -->\nold\n<!-- end -->\nafter", tmp_path)
    assert "| all | 1.5 |" in text
    assert "`python -m x`" in text
    assert "old" not in text
    assert report.fill(text, tmp_path) == text


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
