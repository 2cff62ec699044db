"""How a program ends: a mistake of the user is one line on stderr and exit status 2, as in `goca`."""

import sys
from collections.abc import Callable


MISTAKES = (ValueError, TypeError, RuntimeError, OSError, ImportError)


def run(main: Callable[[], None]) -> None:
    """Run a program. What is raised of `MISTAKES` is one line, which `python -X dev` shows with its traceback."""
    try:
        main()
    except MISTAKES as error:
        if sys.flags.dev_mode:
            raise
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        print(f"{spec.name if spec else sys.argv[0]}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
