"""Programs that measure and train: `python -m eval.<name>`. Not part of the installed package."""

import sys


_before = sys.excepthook


def _in_one_line(kind, error, trace):
    """A package that is not installed ends a program as other mistakes do. A module of ours that is not there is a fault."""
    from eval.common.programs import program, told

    is_ours = (getattr(error, "name", None) or "eval.").startswith(("eval.", "goca_guidance."))
    if sys.flags.dev_mode or is_ours or not issubclass(kind, ModuleNotFoundError):
        return _before(kind, error, trace)
    print(f"{program()}: error: {told(error)}", file=sys.stderr)
    raise SystemExit(2)


if sys.argv[0] == "-m":  # so while Python looks for the program that `python -m` names: its imports come next
    sys.excepthook = _in_one_line
