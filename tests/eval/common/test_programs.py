"""How a program ends."""

import pytest

from eval.common.programs import run


@pytest.mark.parametrize("error", [ValueError, TypeError, RuntimeError, FileNotFoundError, ModuleNotFoundError])
def test_a_mistake_of_the_user_is_one_line(error, capsys):
    def main():
        raise error("Expected this, but got that: do so.")

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_fault_of_ours_is_a_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
