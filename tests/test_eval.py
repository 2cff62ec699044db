"""The programs: results that are whole or absent, training that resumes exactly."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from eval import report, train_tiny
from eval.common import files, provenance
from eval.common.configs import read_toml
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


# ---- configurations --------------------------------------------------------------------------------------------------
def written(folder, **files):
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_file_includes_others(tmp_path):
    """Relative to itself; later ones prevail, and itself over all; tables are merged, and what is included may include."""
    folder = written(
        tmp_path,
        cell='include = ["parts/a.toml", "parts/b.toml"]\nx = 3\n[t]\nz = [9]\n[t.deep]\nd = 4\n',
        parts__a='include = "base.toml"\nx = 1\n[t]\ny = 1\nz = [1, 2]\n[t.deep]\nc = 3\n',
        parts__b="x = 2\n[t]\ny = 2\n",
        parts__base='kind = "base"\n',
    )
    assert read_toml(folder / "cell.toml") == {
        "kind": "base",
        "x": 3,
        "t": {"y": 2, "z": [9], "deep": {"c": 3, "d": 4}},
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": 'include = "b.toml"'}, r"b\.toml, as .*a\.toml includes it, but it is not there"),
        (
            {"a": 'include = "b.toml"', "b": 'include = ["a.toml"]'},
            r"without a circle, but got .*a\.toml -> .*b\.toml -> ",
        ),
        ({"a": 'include = "a.toml"'}, r"without a circle"),
        ({"a": "include = 3"}, r"`include` in .*a\.toml to be a file or a list of files, but got \[?3"),
        ({"a": 'include = "b.toml"', "b": "x ="}, r"well-formed TOML in .*b\.toml"),
    ],
    ids=["missing", "circle", "itself", "no name", "no TOML"],
)
def test_mistakes_in_an_include(files, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_toml(written(tmp_path, **files) / "a.toml")


# ---- caches ----------------------------------------------------------------------------------------------------------
def test_a_measurement_depends_on_named_modules(tmp_path, monkeypatch):
    """On their files and on nothing else that is loaded; a package stands for all that is in it."""
    package = tmp_path / "pretended"
    package.mkdir()
    for name in ("__init__", "one", "two"):
        (package / f"{name}.py").write_text(f"# {name}\n")
    monkeypatch.syspath_prepend(tmp_path)

    def digests():
        provenance.code.cache_clear()
        return [
            provenance.fingerprint(*names, seed=1) for names in (["pretended"], ["pretended.one"], ["pretended.two"])
        ]

    before = digests()
    (package / "two.py").write_text("# changed\n")
    after = digests()
    assert len(set(before)) == 3
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True, False]
    assert provenance.fingerprint("pretended.one", seed=2) != after[1]
