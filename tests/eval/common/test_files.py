"""Files are whole or absent."""

import json

import numpy as np
import pytest

from eval.common import files


def test_replacing_leaves_the_old_file_after_a_failure(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), files.replacing(path) as part:
        part.write_text(f"half {1 / 0}")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_a_file_never_replaces_a_folder(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "kept.json").write_text("mine")
    with pytest.raises(ValueError, match="results to be a file, or not to be there, but it is a folder"):
        files.write_json(tmp_path / "results", {"a": 1})
    with pytest.raises(ValueError, match="results is a folder: add a name"):
        files.writable(tmp_path / "results")
    assert [path.name for path in tmp_path.rglob("*")] == ["results", "kept.json"]


def test_a_folder_whose_replacement_was_killed_comes_back(tmp_path, monkeypatch):
    """Between the two renames there is neither the old folder nor the new one under its name."""
    folder, replace = tmp_path / "checkpoint", files.Path.replace
    folder.mkdir()
    (folder / "a").write_text("old")

    def killed(self, target):
        if self.name == ".part-checkpoint":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(files.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt), files.replacing(folder) as part:
        part.mkdir()
    assert not folder.exists()
    assert (files.recovered(folder) / "a").read_text() == "old"


@pytest.mark.parametrize("place", ["a.json", "new/folder/a.json"])
def test_what_can_be_written(tmp_path, place, monkeypatch):
    assert files.writable(tmp_path / place) == tmp_path / place
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file: name another place"):
        files.writable(tmp_path / "file" / place)
    monkeypatch.setattr(files.os, "access", lambda *args: False)
    with pytest.raises(ValueError, match="cannot be written to"):
        files.writable(tmp_path / place)


def test_a_damaged_file_is_told_and_is_none(tmp_path, capsys):
    assert files.intact(tmp_path / "a.npz", np.load) is None
    assert capsys.readouterr() == ("", "")
    for content in (b"", b"PK\x03\x04", b"x" * 99):
        (tmp_path / "a.npz").write_bytes(content)
        assert files.intact(tmp_path / "a.npz", np.load) is None
        assert "a.npz is damaged and is made again" in capsys.readouterr().out
