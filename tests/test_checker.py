"""The type checks that the tests run under: of shapes, of other types, and none where nothing is annotated."""

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from goca_guidance.method.scfg import rate_map
from tests.helpers.checker import beartype


checked = jaxtyping.jaxtyped(typechecker=beartype)


def test_shapes_are_checked_across_arguments():
    def total(x: Float[Tensor, "b n"], y: Float[Tensor, "b n"] | None) -> Float[Tensor, " b"]:
        return x.sum(1) + (0 if y is None else y.sum(1))

    assert checked(total)(torch.ones(2, 3), None).shape == (2,)
    with pytest.raises(TypeError, match="y"):
        checked(total)(torch.ones(2, 3), torch.ones(2, 4))


def test_shapes_inside_other_types_are_checked():
    def longest(x: list[tuple[str, Float[Tensor, " n"]]]) -> int:
        return len(x)

    with pytest.raises(TypeError, match="x"):
        checked(longest)([("a", torch.ones(2, 2))])


def test_other_types_are_checked():
    def half(x: int) -> float:
        return x / 2

    assert checked(half)(3) == 1.5
    with pytest.raises(TypeError, match="x"):
        checked(half)("3")


def test_what_is_not_annotated_is_left():
    def same(x):
        return x

    assert checked(same) is same


def test_the_library_is_checked():
    with pytest.raises(jaxtyping.TypeCheckError):
        rate_map(1, 2, 3, 4)
