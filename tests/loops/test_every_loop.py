"""Every loop of diffusers that mixes two predictions, tiny and whole: what stock does, and what ours changes in it."""

import pytest
import torch

from tests.helpers.loops.every import LOOPS, stock, stock_call
from tests.helpers.loops.trace import own, scale_of


GUIDED = sorted(name for name, loop in LOOPS.items() if loop.guided)
every_loop = pytest.mark.parametrize("name", GUIDED)


@every_loop
def test_the_loop_mixes_as_it_is_described(name):
    """Else what is said of ours below would be said of another loop."""
    loop, (_, steps) = LOOPS[name], stock_call(name)
    mixing = [step for step in steps if step.u is not None]
    assert len(mixing) == loop.guided
    for step in mixing:
        assert not torch.equal(step.u, step.c)
        mixture = loop.mixed(step.u, step.c, scale_of(stock(name), loop))
        torch.testing.assert_close(*own(loop, step, mixture), rtol=1e-4, atol=loop.tolerance)
