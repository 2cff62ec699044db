"""Programs that measure and train: `python -m eval.<name>`. Not part of the installed package."""

import sys


def _in_one_line(kind, error, trace):
    """A package that is not installed ends a program as other mistakes do."""
    if sys.flags.dev_mode or not issubclass(kind, ModuleNotFoundError):
        return sys.__excepthook__(kind, error, trace)
    print(f'eval: error: {error}. What the programs need: pip install ".[eval]"', file=sys.stderr)
    raise SystemExit(2)


if sys.argv[0] == "-m":  # so while Python looks for the program that `python -m` names: its imports come next
    sys.excepthook = _in_one_line
