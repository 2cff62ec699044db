"""The generation program: noise, pairs, processes, kills, bad files, failures and a full disk."""

import errno
import hashlib
import json
import multiprocessing
import os
import re
import signal
import time
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from eval import coco30k
from eval.common import programs
from eval.common.load import load_pipeline
from eval.generation import generator as generation
from eval.generation.generator import Generator
from eval.generation.run_folder import png_bytes
from goca_guidance import TINY_SD
from tests.helpers.processes import SECONDS, forked, settle
from tests.helpers.runs import few
from tests.helpers.tiny import stock_of


pytestmark = pytest.mark.usefixtures("one_model")
CAPTIONS = {10: "a cat on grass", 2: 'a "dog",\r\nand a bus', 33: "🐈 on snow", 4: "NA", 5: "..."}


def table(path):
    return pd.read_csv(path, dtype={"id": str}, keep_default_na=False)


def made(settings, out, limit=None):
    """A whole run; its images' bytes by id, which the manifest must agree with."""
    assert coco30k.GenerationRun(settings, out, limit)() == {}
    return images_of(out)


def images_of(out):
    manifest, files = table(out / "manifest.csv"), sorted((out / "images").iterdir())
    found = {path.stem: path.read_bytes() for path in files}
    assert [str(path.relative_to(out)) for path in files] == sorted(manifest["file"])
    assert {i: hashlib.sha256(data).hexdigest() for i, data in found.items()} == dict(
        zip(manifest["id"], manifest["sha256"], strict=True)
    )
    return found


def config(path, settings):
    lines = [f"{name} = {json.dumps(value)}" for name, value in vars(settings).items() if value is not None]
    path.write_text("\n".join(lines))
    return path


def csv_of(path, captions):
    pd.DataFrame({"image_id": captions.keys(), "text": captions.values()}).to_csv(path, index=False)
    return str(path)


@pytest.fixture
def latents(monkeypatch, tiny):
    """The initial latents of every call, as the stock pipeline draws them."""
    found, stock = [], type(tiny).prepare_latents
    monkeypatch.setattr(
        type(tiny), "prepare_latents", lambda self, *a, **k: found.append(stock(self, *a, **k)) or found[-1]
    )
    return found


def pixels(data):
    return np.asarray(Image.open(BytesIO(data))).astype(int)


# ---- noise and pairs -------------------------------------------------------------------------------------------------
def test_the_noise_is_the_ids_whatever_the_batch(tmp_path, latents):
    apart, together = made(few(batch=1), tmp_path / "1"), made(few(), tmp_path / "3")
    assert list(apart) == list(together) == [f"{i:06d}" for i in range(7)]
    by_hand = [
        torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(zlib.crc32(f"42 {i}".encode()))) for i in apart
    ]
    assert [len(each) for each in latents] == [1] * 7 + [3, 3, 1]
    assert torch.equal(torch.cat(latents[:7]), torch.cat(by_hand))
    assert torch.equal(torch.cat(latents[7:]), torch.cat(by_hand))
    assert max(abs(pixels(apart[i]) - pixels(together[i])).max() for i in apart) <= 1


def test_methods_are_paired_and_plain_guidance_is_the_stock_pipeline(tmp_path, latents, tiny):
    found = {method: made(few(method=method, size=None), tmp_path / method) for method in generation.METHODS}
    drawn = [torch.cat(latents[3 * i : 3 * i + 3]) for i in range(3)]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert all(
        a != b
        for i in found["cfg"]
        for a, b in [(found["cfg"][i], found["scfg"][i]), (found["scfg"][i], found["goca"][i])]
    )
    texts = few().texts()
    for ids in (list(texts)[:3], list(texts)[3:6], list(texts)[6:]):
        generator = [torch.Generator().manual_seed(zlib.crc32(f"42 {i}".encode())) for i in ids]
        images = stock_of(tiny)(
            [texts[i] for i in ids], num_inference_steps=2, guidance_scale=5.0, generator=generator
        ).images
        assert [png_bytes(image) for image in images] == [found["cfg"][i] for i in ids]


def test_one_seed_for_all(tmp_path, latents):
    made(few(one_seed=True), tmp_path)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(42))
    assert torch.equal(torch.cat(latents), noise.expand(7, -1, -1, -1))
    assert set(table(tmp_path / "manifest.csv")["seed"]) == {42}


def test_captions_are_written_as_they_were_read(tmp_path):
    settings = few(captions=csv_of(tmp_path / "captions.csv", CAPTIONS), method="goca")
    made(settings, tmp_path / "run")
    manifest = table(tmp_path / "run" / "manifest.csv")
    assert dict(zip(manifest["id"], manifest["caption"], strict=True)) == {
        str(i): text for i, text in CAPTIONS.items()
    }
    assert list(manifest["id"]) == ["2", "4", "5", "10", "33"]
    assert list(manifest["seed"]) == [zlib.crc32(f"42 {i}".encode()) for i in manifest["id"]]
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]["method"] == "goca"


# ---- going on --------------------------------------------------------------------------------------------------------
def test_a_killed_run_goes_on_in_two_processes(tmp_path):
    """SIGKILL in the midst, a truncated PNG and half-written files: the same bytes as one run without a break."""
    settings = few(count=24, method="goca", batch=4)
    whole, out = made(settings, tmp_path / "whole"), tmp_path / "killed"
    arguments = [str(config(tmp_path / "run.toml", settings)), "--out", str(out)]
    killed = multiprocessing.get_context("fork").Process(target=lambda: settle() or coco30k.main(arguments))
    killed.start()
    end = time.monotonic() + SECONDS
    while len(done := list(out.glob("images/*.png"))) < 6 and killed.is_alive() and time.monotonic() < end:
        time.sleep(0.005)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert 6 <= len(list(out.glob("images/*.png"))) < 24
    assert not (out / "manifest.csv").exists()
    done[0].write_bytes(done[0].read_bytes()[:-9])
    (out / "images" / ".part-000023.png").write_bytes(b"\x89PNG")
    missing = 24 - len(list(out.glob("images/[0-9]*.png"))) + 1
    told = forked(2, lambda: coco30k.main(arguments), tmp_path)
    shares = [int(re.findall(r"/(\d+) \[", each)[-1]) for each in told]
    assert sum(shares) == missing
    assert max(shares) < missing  # of each process, as its bar says
    assert images_of(out) == whole
    assert (out / "manifest.csv").read_bytes() == (tmp_path / "whole" / "manifest.csv").read_bytes()
    assert [path.name for path in out.rglob(".*")] == [".lock"]


def test_only_what_is_missing_is_made(tmp_path, monkeypatch):
    whole = made(few(), tmp_path)
    (tmp_path / "images" / "000001.png").unlink()
    (tmp_path / "images" / "000006.png").write_bytes(whole["000006"][:-1])
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "000003.png")
    calls, real = [], Generator.__call__
    monkeypatch.setattr(Generator, "__call__", lambda self, *a: calls.append(a) or real(self, *a))
    before = (tmp_path / "images" / "000000.png").stat().st_mtime_ns
    assert made(few(), tmp_path) == whole
    assert [(len(captions), list(wanted)) for captions, wanted in calls] == [
        (3, ["000001"]),
        (3, ["000003"]),
        (1, ["000006"]),
    ]
    assert (tmp_path / "images" / "000000.png").stat().st_mtime_ns == before
    calls.clear()
    assert made(few(), tmp_path) == whole
    assert calls == []


def test_a_limit_can_grow_and_shrink(tmp_path):
    whole, first = made(few(), tmp_path / "whole"), made(few(), tmp_path / "grows", 5)
    assert first == dict(list(whole.items())[:5])
    assert made(few(), tmp_path / "grows") == whole == made(few(), tmp_path / "grows", 2)


# ---- folders ---------------------------------------------------------------------------------------------------------
def test_foreign_files_are_named_and_kept(tmp_path):
    made(few(), tmp_path, 2)
    for name in ("holiday.png", "999999.png", "notes.txt"):
        (tmp_path / "images" / name).write_text("mine")
    with pytest.raises(ValueError, match=r"found 999999.png, holiday.png, notes.txt: move them away"):
        coco30k.GenerationRun(few(), tmp_path)()
    assert (tmp_path / "images" / "holiday.png").read_text() == "mine"


@pytest.mark.parametrize("name", ["images/000001.png", "settings.json", "manifest.csv"])
def test_a_folder_in_a_files_place_is_named_and_kept(tmp_path, name):
    (tmp_path / "images").mkdir()
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"these are folders: {Path(name).name}. Move them away"):
        coco30k.GenerationRun(few(), tmp_path)()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name / "mine.txt"]


def test_a_file_in_the_place_of_the_images(tmp_path):
    (tmp_path / "images").write_text("mine")
    with pytest.raises(ValueError, match=r"a folder of images, but .*images is none"):
        coco30k.GenerationRun(few(), tmp_path)()


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    """As on a file system that is mounted read-only, where even root may not write."""
    made(few(), tmp_path, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(os, "access", lambda *args: False)
    for out in (tmp_path, tmp_path / "new"):
        with pytest.raises(ValueError, match="cannot be written to: name another place"):
            coco30k.GenerationRun(few(), out)()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("change", [{"model": "nowhere"}, {"denoiser": "nowhere"}, {"captions": "nowhere.csv"}])
def test_a_failed_start_claims_no_folder(tmp_path, monkeypatch, change):
    monkeypatch.setattr(generation, "load_pipeline", load_pipeline)
    with pytest.raises((ValueError, OSError), match="nowhere"):
        coco30k.GenerationRun(few(**change), tmp_path / "run")()
    assert not (tmp_path / "run").exists()
    assert len(made(few(), tmp_path / "run", 1)) == 1  # and it is free for another start


@pytest.mark.parametrize("name", ["images/000001.png", "thesis.txt"])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path, name):
    (tmp_path / "images").mkdir()
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"found {Path(name).name}: move"):
        coco30k.GenerationRun(few(), tmp_path)()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]


def test_hidden_files_are_nobodys(tmp_path):
    whole = made(few(), tmp_path)
    (tmp_path / "images" / ".DS_Store").write_text("")
    assert coco30k.GenerationRun(few(), tmp_path)() == {}
    assert len(whole) == 7


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "null", '{"settings": {}}', '{"settings": [], "versions": {}}', "\xff"]
)
def test_damaged_settings_are_told(tmp_path, content):
    made(few(), tmp_path, 1)
    (tmp_path / "settings.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"the settings of a run in .*settings.json, but got .*: if its images are of"
    ):
        coco30k.GenerationRun(few(), tmp_path)()
    assert (tmp_path / "settings.json").read_bytes() == content.encode("latin-1")


def test_one_run_at_a_time(tmp_path, monkeypatch):
    """A second start changes nothing, and the first ends well."""
    run, others, real = coco30k.GenerationRun(few(), tmp_path), [], Generator.__call__

    def second(self, *args):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / ".part-000000.png").write_bytes(b"half")
        with pytest.raises(ValueError, match="another is at work"):
            coco30k.GenerationRun(few(), tmp_path)()
        others.append((tmp_path / "images" / ".part-000000.png").read_bytes())
        return real(self, *args)

    monkeypatch.setattr(Generator, "__call__", second)
    assert run() == {}
    assert others == [b"half"] * 3
    monkeypatch.setattr(Generator, "__call__", real)
    assert coco30k.GenerationRun(few(), tmp_path)() == {}


def test_other_settings_are_named(tmp_path, monkeypatch):
    made(few(), tmp_path, 1)
    with pytest.raises(ValueError, match=r"differ: guidance_scale was 5.0 and is 3.0; steps was 2 and is 3\. Use"):
        coco30k.GenerationRun(few(guidance_scale=3.0, steps=3), tmp_path)()
    with pytest.raises(ValueError, match=r"differ: split .*; captions_sha256"):
        coco30k.GenerationRun(few(split="validation"), tmp_path)()
    monkeypatch.setattr(coco30k, "versions", lambda packages: dict.fromkeys(packages, "0"))
    with pytest.raises(ValueError, match=r"differ: torch was '.*' and is '0'; diffusers"):
        coco30k.GenerationRun(few(), tmp_path)()


def test_a_moved_model_and_moved_captions_are_the_same(tmp_path, monkeypatch):
    captions = {i: text for i, text in CAPTIONS.items() if i < 5}
    first = few(captions=csv_of(tmp_path / "captions.csv", captions))
    whole = made(first, tmp_path / "run")
    (tmp_path / "model").symlink_to(TINY_SD)
    monkeypatch.setattr(coco30k, "commit", lambda: "another")
    moved = few(captions=csv_of(tmp_path / "moved.csv", captions), model=str(tmp_path / "model"))
    assert made(moved, tmp_path / "run") == whole
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["commit"].endswith(", another")
    csv_of(tmp_path / "moved.csv", captions | {2: "a bird"})
    with pytest.raises(ValueError, match="differ: captions_sha256"):
        coco30k.GenerationRun(moved, tmp_path / "run")()


# ---- failures --------------------------------------------------------------------------------------------------------
def failing(monkeypatch, error, times=10**6, name="000004"):
    """Calls with this id fail so many times; returns the ids of all calls."""
    calls, real = [], Generator.pixels

    def made_or_not(self, captions):
        calls.append(list(captions))
        if name in captions and sum(name in call for call in calls) <= times:
            raise error
        return real(self, captions)

    monkeypatch.setattr(Generator, "pixels", made_or_not)
    return calls


def test_what_fails_in_a_batch_is_tried_alone(tmp_path, monkeypatch):
    calls = failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), times=1)
    made(few(), tmp_path)
    assert calls == [[f"{i:06d}" for i in ids] for ids in ([0, 1, 2], [3, 4, 5], [3], [4], [5], [6])]
    assert not (tmp_path / "failed.csv").exists()


def test_a_failing_machine_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(coco30k, "HOPELESS", 5)
    calls = []

    def pixels(self, captions):
        calls.append(list(captions))
        if calls[0] != calls[-1]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return real(self, captions)

    real = Generator.pixels
    monkeypatch.setattr(Generator, "pixels", pixels)
    with pytest.raises(RuntimeError, match=r"6 captions in a row have none; the last one: CUDA error"):
        coco30k.GenerationRun(few(count=30), tmp_path)()
    assert len(calls) == 1 + 2 * 4
    monkeypatch.setattr(Generator, "pixels", real)
    assert len(made(few(count=30), tmp_path, 6)) == 6


def test_a_batch_that_fails_is_told(tmp_path, monkeypatch, capsys):
    failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), times=1)
    made(few(), tmp_path)
    assert "A batch of 3 failed, each of its captions is tried alone: CUDA out of memory" in capsys.readouterr().out


def test_what_fails_again_is_listed_and_made_the_next_time(tmp_path, monkeypatch):
    toml, out = config(tmp_path / "run.toml", few()), tmp_path / "run"
    calls = failing(monkeypatch, ValueError('Expected a word,\nbut got "".'))
    with pytest.raises(SystemExit, match=r"1 of 7 captions have no image: see .*failed.csv"):
        coco30k.main([str(toml), "--out", str(out)])
    assert calls.count(["000004"]) == 1
    assert table(out / "failed.csv").to_dict("records") == [
        {"id": "000004", "reason": 'Expected a word,\nbut got "".'}
    ]
    assert list(images_of(out)) == [f"{i:06d}" for i in range(7) if i != 4]
    monkeypatch.undo()
    coco30k.main([str(toml), "--out", str(out)])
    assert len(images_of(out)) == 7
    assert not (out / "failed.csv").exists()


def test_an_image_of_nan_fails_alone(tmp_path, monkeypatch):
    real = Generator.pixels

    def broken(self, captions):
        found = real(self, captions)
        found[[name == "000004" for name in captions], 3, 3, 0] = np.nan
        return found

    monkeypatch.setattr(Generator, "pixels", broken)
    failed = coco30k.GenerationRun(few(), tmp_path)()
    assert list(failed) == ["000004"]
    assert "NaN" in failed["000004"]
    assert len(images_of(tmp_path)) == 6


def test_mistakes_of_ours_are_not_hidden(tmp_path, monkeypatch):
    failing(monkeypatch, AttributeError("a bug"))
    with pytest.raises(AttributeError, match="a bug"):
        coco30k.GenerationRun(few(), tmp_path)()


def test_empty_captions_are_listed_under_every_method(tmp_path):
    captions = csv_of(tmp_path / "captions.csv", CAPTIONS | {3: "", 1: " \n"})
    found = {
        method: coco30k.GenerationRun(few(captions=captions, method=method), tmp_path / method)()
        for method in ("cfg", "goca")
    }
    assert found["cfg"] == found["goca"] == {"1": "The caption is empty.", "3": "The caption is empty."}
    assert list(table(tmp_path / "cfg" / "failed.csv")["id"]) == ["1", "3"]
    assert set(images_of(tmp_path / "cfg")) == set(images_of(tmp_path / "goca")) == {str(i) for i in CAPTIONS}


@pytest.mark.parametrize("full", ["000004.png", "manifest.csv", "settings.json"])
def test_a_full_disk_stops_at_once(tmp_path, monkeypatch, capsys, full):
    toml, out, real = config(tmp_path / "run.toml", few()), tmp_path / "run", Path.write_bytes

    def write(self, data):
        if self.name == f".part-{full}":
            real(self, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(SystemExit, match="2"):
        programs.run(lambda: coco30k.main([str(toml), "--out", str(out)]))
    assert re.search(r"error: The disk of .* is full. Make room and start again", capsys.readouterr().err)
    present = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in present if path.name.startswith(".part") or path.name == full]
    assert len(list(out.glob("images/*"))) == {"000004.png": 4, "manifest.csv": 7, "settings.json": 0}[full]
    monkeypatch.setattr(Path, "write_bytes", real)
    coco30k.main([str(toml), "--out", str(out)])
    assert len(images_of(out)) == 7


def test_other_errors_of_the_disk_pass(tmp_path, monkeypatch):
    def write(self, data):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(PermissionError):
        coco30k.main([str(config(tmp_path / "run.toml", few())), "--out", str(tmp_path / "run")])


# ---- the file --------------------------------------------------------------------------------------------------------
def test_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(coco30k, "RUNS", tmp_path)
    coco30k.main([str(config(tmp_path / "some.toml", few())), "--scale", "7.5", "--limit", "1"])
    assert json.loads((tmp_path / "some_7.5" / "settings.json").read_text())["settings"]["guidance_scale"] == 7.5
    assert len(images_of(tmp_path / "some_7.5")) == 1
    with pytest.raises(SystemExit):
        coco30k.main([str(tmp_path / "some.toml"), "--limit", "0"])
