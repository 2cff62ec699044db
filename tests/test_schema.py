"""What the doors read, and the one line that says what they do not."""

import inspect
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import numpy as np
import pytest
import torch

from goca_guidance import Background, GoCAConfig, SCFGConfig
from goca_guidance.schema import FILLED, ODD, above, at_least, between, checked, read


Odd = Annotated[int, ODD, at_least(1)]
Regions = Mapping[str, Sequence[int]]
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("value", "hint", "plain"),
    [
        (np.int64(3), Odd, 3),
        (torch.tensor(3), Odd, 3),
        (2, float, 2),
        (np.float32(0.5), float, 0.5),
        (Fraction(1, 2), float, 0.5),
        (np.True_, bool, True),
        (None, Optional[int], None),  # noqa: UP045
        ("b", Literal["a", "b"] | None, "b"),
        (["a"], tuple[str, ...], ("a",)),
        (range(2), Sequence[int], [0, 1]),
        (np.arange(2), Sequence[int], [0, 1]),
        ({"cat": torch.tensor([1, 2])}, Regions | Sequence[Regions], {"cat": [1, 2]}),
        ([{"cat": (torch.tensor(1),)}], Regions | Sequence[Regions], [{"cat": [1]}]),
        (Path("a"), str | Path, Path("a")),
        (len, Callable[[Any], int], len),
        (object, Any, object),
    ],
)
def test_what_fits_comes_in_plain_form(value, hint, plain):
    found = read("x", value, hint)
    assert found == plain
    assert type(found) is type(plain)


@pytest.mark.parametrize(
    ("value", "hint", "error", "message"),
    [
        ("3", Odd, TypeError, "an odd whole number of at least 1, but got '3'"),
        (True, Odd, TypeError, "an odd whole number of at least 1, but got True"),
        (3.0, Odd, TypeError, "an odd whole number of at least 1, but got 3.0"),
        (2, Odd, ValueError, "an odd whole number of at least 1, but got 2"),
        (-1, Odd, ValueError, "an odd whole number of at least 1, but got -1"),
        (NAN, float, ValueError, "a finite number, but got nan"),
        (-INF, float, ValueError, "a finite number, but got -inf"),
        (np.float32("nan"), float, ValueError, "a finite number, but got nan"),
        (10**400, float, ValueError, f"a finite number, but got 1{'0' * 76}..."),
        (1j, float, TypeError, "a finite number, but got 1j"),
        (False, float, TypeError, "a finite number, but got False"),
        (0, Annotated[float, above(0)], ValueError, "a finite number above 0, but got 0"),
        (2, Annotated[float, between(0, 1)] | None, ValueError, "a finite number from 0 to 1 or None, but got 2"),
        (1, bool, TypeError, "True or False, but got 1"),
        ("no", bool, TypeError, "True or False, but got 'no'"),
        ("c", Literal["a", "b"] | None, ValueError, "one of 'a', 'b' or None, but got 'c'"),
        (1, Literal["a", "b"], TypeError, "one of 'a', 'b', but got 1"),
        (None, str, TypeError, "a text, but got None"),
        ("a", Path, TypeError, "a Path, but got 'a'"),
        ("cat", Sequence[str], TypeError, "a list of texts, but got 'cat': use ['cat']"),
        ({"cat"}, Sequence[str], TypeError, "a list of texts, but got {'cat'}"),
        ([], Annotated[Sequence[str], FILLED], ValueError, "a non-empty list of texts, but got []"),
        (torch.zeros(2, 2), torch.Generator, TypeError, "a Generator, but got tensor([[0., 0.], [0., 0.]])"),
        ({}, GoCAConfig | None, TypeError, "a GoCAConfig or None, but got {}"),
        (3, Callable[[Any], Any], TypeError, "a callable, but got 3"),
        (5, Regions, TypeError, "a mapping of texts to lists of whole numbers, but got 5"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(value, hint, error, message):
    with pytest.raises(error) as told:
        read("x", value, hint)
    assert str(told.value) == f"Expected `x` to be {message}."


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (["a", 3], Sequence[str], "`x[1]` to be a text, but got 3"),
        (["a", 3], Sequence[str] | Sequence[Sequence[str]], "`x[1]` to be a text, but got 3"),
        ([["a"], "b"], Sequence[str] | Sequence[Sequence[str]], "`x[1]` to be a list of texts, but got 'b': use ['b']"),
        ({"cat": 2}, Regions, "`x['cat']` to be a list of whole numbers, but got 2: use [2]"),
        ({"cat": np.array([0.5])}, Regions, "`x['cat'][0]` to be a whole number, but got 0.5"),
        ({3: [1]}, Regions, "`x[3]` to be a text, but got 3"),
        ([{"cat": None}], Regions | Sequence[Regions] | None, "`x[0]['cat']` to be a list of whole numbers, but got None"),
    ],
)  # fmt: skip
def test_the_element_that_does_not_fit_is_named(value, hint, message):
    with pytest.raises(TypeError) as told:
        read("x", value, hint)
    assert str(told.value) == f"Expected {message}."


# ---- dataclasses and functions ---------------------------------------------------------------------------------------
@checked
@dataclass(frozen=True)
class Settings:
    names: tuple[str, ...] = ()
    size: Odd = 5
    parent: "Settings | None" = None


@checked
def called(images, count: Annotated[int, at_least(1)] = 1, *args, flag: bool = False, **kwargs):
    return images, count, args, flag, kwargs


def test_a_dataclass_reads_its_fields():
    settings = Settings(["a"], np.int64(3), Settings())
    assert settings == pickle.loads(pickle.dumps(settings)) == Settings(("a",), 3, Settings())
    assert hash(settings)
    assert replace(settings, size=7).size == 7
    with pytest.raises(TypeError, match="Expected `parent` to be a Settings or None, but got 3"):
        replace(settings, parent=3)
    with pytest.raises(
        TypeError, match=r"^Expected the arguments of Settings, but got: too many positional arguments.$"
    ):
        Settings((), 1, None, 2)


def test_a_function_reads_its_arguments():
    assert inspect.unwrap(called) is called
    assert [*inspect.signature(called).parameters] == ["images", "count", "args", "flag", "kwargs"]
    assert called("a", np.int32(2), "b", flag=np.True_, other=3) == ("a", 2, ("b",), True, {"other": 3})
    with pytest.raises(ValueError, match="Expected `count` to be a whole number of at least 1, but got 0"):
        called("a", 0)
    with pytest.raises(TypeError, match="Expected `flag` to be True or False, but got 'no'"):
        called("a", flag="no")
    with pytest.raises(
        TypeError, match=r"^Expected the arguments of called, but got: missing a required argument: 'images'"
    ):
        called()


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (GoCAConfig, "blur_sgima", "Expected a field of GoCAConfig, but got `blur_sgima`: write `blur_sigma`."),
        (GoCAConfig.vanilla, "refine_oder", "a field of GoCAConfig, but got `refine_oder`: write `refine_order`."),
        (SCFGConfig, "rate_mni", "a field of SCFGConfig, but got `rate_mni`: write `rate_min`."),
        (Background, "xyz", "a field of Background, but got `xyz`: known are entities, merged, offset, threshold."),
    ],
)
def test_a_name_that_is_not_known(make, name, message):
    with pytest.raises(TypeError, match=message):
        make(**{name: 1})


# ---- the configurations ----------------------------------------------------------------------------------------------
WRONG = ["3", None, NAN, INF, -1, 0, True, 1.5, [1], 10**400]


@pytest.mark.parametrize(
    ("make", "name", "fine"),
    [
        *((GoCAConfig, name, (None,)) for name in ("reference_channels", "agreement_rows", "working_size")),
        (GoCAConfig, "refine_order", (None, 0)),
        (GoCAConfig, "blur_size", ()),
        (GoCAConfig, "blur_sigma", (1.5,)),
        *((GoCAConfig, name, (True,)) for name in ("rescale", "drop_stop_words")),
        (GoCAConfig, "row_normalise", (True, None)),
        (GoCAConfig, "heads", (None,)),
        (GoCAConfig, "layers", ()),
        *((SCFGConfig, name, (1.5,)) for name in ("rate_min", "rate_max", "ceiling", "smooth_sigma")),
        *((SCFGConfig, name, ()) for name in ("smooth_size", "every", "segmentor")),
        *((SCFGConfig, name, (True,)) for name in ("variance_channels", "equal_mean")),
    ],
)
def test_every_field_refuses_every_wrong_value(make, name, fine):
    for value in WRONG:
        if any(value is each or (value == each and type(value) is type(each)) for each in fine):
            make(**{name: value})
        else:
            with pytest.raises((TypeError, ValueError), match=f"^Expected `{name}(\\[0\\])?` to be .*\\.$"):
                make(**{name: value})


@pytest.mark.parametrize("changes", [{"rate_min": 2, "rate_max": 1}, {"rate_max": 0.5}])
def test_limits_in_the_wrong_order(changes):
    with pytest.raises(ValueError, match="Expected `rate_min` to be at most `rate_max`"):
        SCFGConfig(**changes)


@pytest.mark.parametrize("value", ["sky", True, NAN, INF, {"sky": 1}, [1], [["sky"]], object()])
def test_what_is_no_background(value):
    with pytest.raises((TypeError, ValueError), match=r"^Expected `background(\[0\])?` to be "):
        Background.of(value)


def test_what_is_a_background():
    assert Background.of(np.float32(0.5)) == Background(threshold=0.5)
    assert Background.of(["sky"]) == Background.of(np.array(["sky"])) == Background(("sky",))
    with pytest.raises(ValueError, match="a `threshold`, `entities`, or both"):
        Background.of([])
