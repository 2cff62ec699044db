"""Where files lie: this repository, and local test data beside it."""

from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


def shared(path: str) -> Path:
    """A file or folder of local test data, or a skip."""
    if not (found := ROOT.parent / "shared" / "data" / path).exists():
        pytest.skip(f"needs ../shared/data/{path} (local test data, not in this repository)")
    return found
