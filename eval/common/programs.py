"""A program's command line and its end: a mistake of the user is one line on stderr and exit status 2, as in `goca`."""

import argparse
import errno
import math
import sys
from collections.abc import Callable
from pathlib import Path


MISTAKES = (ValueError, TypeError, RuntimeError, OSError, ImportError)
FULL = (errno.ENOSPC, errno.EDQUOT)


def run(main: Callable[[], None]) -> None:
    """Run a program. What is raised of `MISTAKES` is one line, which `python -X dev` shows with its traceback."""
    try:
        main()
    except MISTAKES as error:
        if sys.flags.dev_mode:
            raise
        print(f"{program()}: error: {told(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def program() -> str:
    """The name under which the program was started, such as `eval.coco30k`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name


def told(error: BaseException) -> str:
    """An error in one line; a file that cannot be used, a full disk and a package that is not there with what to do."""
    if isinstance(error, OSError) and error.errno in FULL:
        return (
            f"The disk of {error.filename or 'the files'} is full. Make room and start again: what is there is whole."
        )
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        name, reason = error.filename, error.strerror.lower()
        return (
            f"Expected {name} as a file or folder that can be used here, but got: {reason}. Mend it, or name another."
        )
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f'{error}. What the programs need: pip install ".[eval]"'
    return " ".join(str(error).split()) or type(error).__name__


# ---- the command line ------------------------------------------------------------------------------------------------
def command_line(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the program's docstring as it stands."""
    shown = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {program()}", description=description, formatter_class=shown)


def at_least(low: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number of at least `low`."""

    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {low}, but got {text!r}")
        return value

    return whole


def positive(text: str) -> float:
    """The type of an argument that is a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, but got {text!r}")
    return value
