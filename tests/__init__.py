"""What you trust: tiny real models built in code, no network."""

from tests.helpers import checker as checker  # the run-time type checker that pyproject.toml names
