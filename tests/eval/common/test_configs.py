"""TOML files that include others."""

import re

import pytest

from eval.common.configs import from_file, read_toml
from eval.generation.generator import GenerationSettings


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


def test_a_whole_number_is_a_number(tmp_path):
    path = written(tmp_path, a="guidance_scale = 5\n") / "a.toml"
    assert from_file(GenerationSettings, path, size=None).guidance_scale == 5


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("steps = 2.5", r"`steps` to be a whole number of at least 1, but got 2\.5"),
        ("steps = 0", "`steps` to be a whole number of at least 1, but got 0"),
        ('seed = "x"', "`seed` to be a whole number from 0 to .*, but got 'x'"),
        ("seed = -1", "`seed` to be a whole number from 0 to .*, but got -1"),
        ('one_seed = "no"', "`one_seed` to be True or False, but got 'no'"),
        ("one_seed = 1", "`one_seed` to be True or False, but got 1"),
        ("batch = true", "`batch` to be a whole number of at least 1, but got True"),
        ('size = "64"', "`size` to be a whole number of at least 8 or None, but got '64'"),
        ("size = 63", "`size` to be a multiple of 8 pixels, but got 63"),
        ("guidance_scale = nan", "`guidance_scale` to be a finite number above 0, but got nan"),
        ("guidance_scale = inf", "`guidance_scale` to be a finite number above 0, but got inf"),
        ("guidance_scale = 2026-01-01", "`guidance_scale` to be a finite number above 0, but got datetime"),
        ("model = ['a']", r"`model` to be a text, but got \['a'\]"),
        ("[captions]\na = 1", "`captions` to be a text, but got {'a': 1}"),
        ('method = "gocha"', "`method` to be one of 'cfg', 'scfg', 'goca', but got 'gocha'"),
        ('split = "testing"', "`split` to be one of 'train', 'validation', 'test', but got 'testing'"),
        ('scheduler = "UNet2DModel"', "`scheduler` to be a scheduler of diffusers, but got 'UNet2DModel'"),
        ("guidance_scales = 5", "got `guidance_scales`: write `guidance_scale`"),
        ("zebra = 5", "got `zebra`: known are batch, captions, "),
    ],
)
def test_values_are_of_their_fields_types(text, wanted, tmp_path):
    """And a mistake names the file and the key, in one line."""
    path = written(tmp_path, a=text) / "a.toml"
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{wanted}") as mistake:
        GenerationSettings.read(path)
    assert "\n" not in str(mistake.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "a.toml").write_bytes(b'model = "\xff"')
    with pytest.raises(ValueError, match=r"well-formed TOML in .*a\.toml"):
        read_toml(tmp_path / "a.toml")
