"""How a program ends."""

import errno
import os
import subprocess
import sys

import pytest

from eval.common import programs
from eval.common.programs import run
from tests.helpers.places import ROOT


@pytest.mark.parametrize("error", [ValueError, TypeError, RuntimeError, FileNotFoundError, ModuleNotFoundError])
def test_a_mistake_of_the_user_is_one_line(error, capsys):
    def main():
        raise error("Expected this, but got that: do so.")

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("Expected this,\n  but got\tthat."), "Expected this, but got that."),
        (RuntimeError(), "RuntimeError"),
        (OSError(errno.ENOSPC, "No space left on device", "a.png"), "The disk of a.png is full. Make room and start again"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "The disk of the files is full."),
        (OSError(errno.EROFS, "Read-only file system", "runs/a"), "Expected runs/a as a file or folder that can be used"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "No module named 'x'. What the programs need: pip"),
        (OSError("not a repository\nof the hub"), "not a repository of the hub"),
    ],
)  # fmt: skip
def test_every_error_is_told_in_one_line(error, told):
    assert programs.told(error).startswith(told) or told in programs.told(error)
    assert "\n" not in programs.told(error)


def test_a_fault_of_ours_is_a_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def without(name, tmp_path):
    """How `python -m eval.report --help` ends where a module is not there."""
    (tmp_path / "sitecustomize.py").write_text(ABSENT.format(name=name))
    program = [sys.executable, "-m", "eval.report", "--help"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDEVMODE"} | {"PYTHONPATH": str(tmp_path)}
    return subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_package_that_is_not_installed_is_one_line(tmp_path):
    ended = without("pandas", tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == (
        "eval.report: error: No module named 'pandas'. What the programs need: pip install \".[eval]\"\n"
    )


def test_a_module_of_ours_that_is_not_there_is_a_traceback(tmp_path):
    ended = without("eval.common.tables", tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Traceback")
