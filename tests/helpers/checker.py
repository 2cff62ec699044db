"""The run-time type checker of the test suite: beartype, with int accepted for float as PEP 484 says."""

from beartype import BeartypeConf
from beartype import beartype as _beartype


beartype = _beartype(conf=BeartypeConf(is_pep484_tower=True))
