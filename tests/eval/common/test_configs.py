"""TOML files that include others."""

import pytest

from eval.common.configs import from_mapping, read_toml
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


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"steps": 2.5}, r"`steps` to be a whole number, but got 2\.5"),
        ({"seed": "x"}, "`seed` to be a whole number, but got 'x'"),
        ({"one_seed": "no"}, "`one_seed` to be true or false, but got 'no'"),
        ({"batch": True}, "`batch` to be a whole number, but got True"),
        ({"size": "64"}, "`size` to be a whole number or left out, but got '64'"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_values_are_of_their_fields_types(changes, wanted):
    assert from_mapping(GenerationSettings, {"guidance_scale": 5, "size": None}).guidance_scale == 5  # a whole number
    with pytest.raises(ValueError, match=wanted):
        from_mapping(GenerationSettings, changes)
