"""How a program ends: a mistake of the user is one line on stderr and exit status 2, as in `goca`."""

import sys
from collections.abc import Callable


def run(main: Callable[[], None]) -> None:
    """Run a program. `ValueError`, `TypeError` and a file that cannot be had are mistakes of the user; all else is ours."""
    try:
        main()
    except (ValueError, TypeError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        print(f"{spec.name if spec else sys.argv[0]}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
