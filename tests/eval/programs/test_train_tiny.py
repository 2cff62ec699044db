"""Training resumes exactly, and what it exports can be loaded."""

import pytest
import torch
from safetensors.torch import load_file

from eval import train_tiny
from tests.helpers.tiny import tiny_components


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
