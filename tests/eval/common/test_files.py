"""Files are whole or absent."""

import json

import pytest

from eval.common import files


def test_replacing_leaves_the_old_file_after_a_failure(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), files.replacing(path) as part:
        part.write_text(f"half {1 / 0}")
    assert json.loads(path.read_text()) == {"a": 1}
