"""One schema for every door: a value is read by its type annotation, and a mistake is one line that names the fix.

Pydantic and beartype check as much, but their messages run over many lines; the dataclasses of huggingface_hub check neither
frozen fields nor bounds.
"""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints


T = TypeVar("T")
SEQUENCES = (list, tuple, Sequence)
NOUNS = {int: "whole number", float: "finite number", str: "text", Callable: "callable"}
WORDS = {bool: "True or False", NoneType: "None", Any: "anything"}  # which take no article
LARGEST = {int: 2**63 - 1, float: sys.float_info.max}  # what torch and numpy can hold
PLAIN = (bool, int, float, *SEQUENCES)  # read off arrays and tensors too


@dataclass(frozen=True)
class Bound:
    """What a value must fulfil beyond its type, as in `Annotated[int, at_least(1)]`; in words behind or before the noun."""

    words: str
    holds: Callable[[Any], bool]
    before: bool = False


ODD = Bound("odd", lambda value: value % 2 == 1, before=True)
FILLED = Bound("non-empty", lambda value: len(value) > 0, before=True)


def at_least(least: float) -> Bound:
    return Bound(f"of at least {least}", lambda value: value >= least)


def above(low: float) -> Bound:
    return Bound(f"above {low}", lambda value: value > low)


def between(low: float, high: float) -> Bound:
    return Bound(f"from {low} to {high}", lambda value: low <= value <= high)


Count = Annotated[int, at_least(1)]
Positive = Annotated[float, above(0)]


# ---- the doors -------------------------------------------------------------------------------------------------------
def checked(target: T) -> T:
    """Decorator: a dataclass reads its fields, and a function its arguments, by their annotations; see `read`.

    Defaults, and arguments without an annotation, are taken as they are. TypeError for names that are not known.
    """
    function: Any = target.__init__ if isinstance(target, type) else target
    signature, name = inspect.signature(function), getattr(target, "__name__", "")
    owner = f"a field of {name}" if isinstance(target, type) else f"an argument of {name}"
    parameters = [p for key, p in signature.parameters.items() if key != "self"]
    read_by_name = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    takes_any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)

    @functools.cache
    def hints() -> dict[str, Any]:  # when first asked for: a class may be named in its own annotations
        return {n: h for n, h in get_type_hints(function, include_extras=True).items() if n in read_by_name}

    @functools.wraps(function)
    def reading(*args, **kwargs):
        if not takes_any_name:
            check_names(kwargs, read_by_name, owner, hints())
        try:
            call = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"Expected the arguments of {name}, but got: {error}.") from None
        for key in call.arguments.keys() & hints().keys():
            call.arguments[key] = read(key, call.arguments[key], hints()[key])
        return function(*call.args, **call.kwargs)

    reading.__signature__ = signature  # type: ignore[attr-defined]
    del reading.__wrapped__  # type: ignore[attr-defined]  # who unwraps a function of its decorators must not lose the reading
    if isinstance(target, type):
        target.__init__ = reading  # type: ignore[misc]
        return target
    return reading  # type: ignore[return-value]


def check_names(
    given: Iterable[str], known: Iterable[str], owner: str, hints: Mapping[str, Any] | None = None
) -> None:
    """TypeError for a name that is not known, with the known one that is spelled most like it, else with all.

    Fields of the dataclasses in `hints`, an annotation for each argument, are told where they belong.
    """
    known = sorted(known)
    spelled = {**fields_in(hints or {}), **{name: name for name in known}}
    for name in given:
        if name not in known:
            near = [name] if name in spelled else get_close_matches(str(name), spelled, 1)
            fix = f"write `{spelled[near[0]]}`" if near else f"known are {', '.join(known) or 'none'}"
            raise TypeError(f"Expected {owner}, but got `{name}`: {fix}.")


def fields_in(hints: Mapping[str, Any]) -> dict[str, str]:
    """Fields of the dataclasses among annotations of arguments, with how one writes them."""
    return {
        field.name: f"{argument}={cls.__name__}({field.name}=...)"
        for argument, hint in hints.items()
        for cls in _options(hint)
        if isinstance(cls, type) and is_dataclass(cls)
        for field in fields(cls)
    }


def read(name: str, value: Any, hint: Any) -> Any:
    """The value in plain form, by a type annotation: arrays and tensors as lists and numbers, sequences as list or tuple.

    Read are unions, `Literal`, bool (no number), int (no bool), float (any finite number), sequences (no text), mappings,
    `Annotated` with a `Bound`, and every other class by isinstance. TypeError for a wrong type, ValueError for a wrong value:
    one line, which names the element.
    """
    try:
        return _read((name,), value, hint)
    except _MisfitError as misfit:
        raise misfit.error() from None


def switched_on(name: str) -> bool:
    """Whether a variable of the environment is 1; it is off unless it is set. ValueError where it is neither 0 nor 1."""
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise ValueError(f"Expected {name} to be 0 or 1, but got {value!r}: set it to one of them, or unset it.")
    return value == "1"


def shown(value: Any, longest: int = 80) -> str:
    """A value as a message shows it: one line, cut."""
    text = " ".join(repr(value).split())
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


# ---- reading ---------------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class _MisfitError(Exception):
    path: tuple  # the argument's name, then keys
    value: Any
    hint: Any
    kind: type[Exception] = TypeError

    def error(self) -> Exception:
        name = self.path[0] + "".join(f"[{key!r}]" for key in self.path[1:])
        elements = [get_args(option)[0] for option in _options(self.hint) if get_origin(option) in SEQUENCES]
        fix = f": use [{shown(self.value)}]" if any(_fits(self.value, element) for element in elements) else ""
        return self.kind(f"Expected `{name}` to be {_phrase(self.hint)}, but got {shown(self.value)}{fix}.")


def _read(path: tuple, value: Any, hint: Any) -> Any:
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in PLAIN and hasattr(value, "tolist"):  # an array or a tensor
        value = value.tolist()
    if kind is Any:
        return value
    if kind in (Union, UnionType):
        return _read_option(path, value, hint)
    if kind is Annotated:
        return _read_bounded(path, value, hint)
    if kind is Literal and not any((type(value), value) == (type(choice), choice) for choice in parts):
        raise _MisfitError(path, value, hint, ValueError if type(value) in map(type, parts) else TypeError)
    if isinstance(kind, type) and not _is_a(value, kind):
        raise _MisfitError(path, value, hint)
    if kind in LARGEST and not abs(value) <= LARGEST[kind]:  # so written, NaN is refused too
        raise _MisfitError(path, value, hint, ValueError)
    if kind is float and not isinstance(value, int):
        return float(value)
    if kind in SEQUENCES and parts:
        read_all = (_read((*path, index), element, parts[0]) for index, element in enumerate(value))
        return tuple(read_all) if kind is tuple else list(read_all)
    if kind in (dict, Mapping) and parts:
        return {_read((*path, k), k, parts[0]): _read((*path, k), v, parts[1]) for k, v in value.items()}
    return value


def _is_a(value, kind) -> bool:
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind in SEQUENCES:
        return isinstance(value, list if kind is list else Sequence) and not isinstance(value, (str, bytes))
    return isinstance(value, Mapping if kind is dict else kind)


def _read_option(path, value, hint):
    """By the first option that fits; else the misfit that lies deepest is told, or that none fits."""
    misfits: list[_MisfitError] = []
    for option in get_args(hint):
        try:
            return _read(path, value, option)
        except _MisfitError as misfit:
            misfits.append(misfit)
    deepest = max(misfits, key=lambda misfit: (len(misfit.path), [k for k in misfit.path if isinstance(k, int)]))
    if len(deepest.path) > len(path):
        raise deepest
    kinds = {misfit.kind for misfit in misfits}
    raise _MisfitError(path, value, hint, ValueError if ValueError in kinds else TypeError)


def _read_bounded(path, value, hint):
    base, *bounds = get_args(hint)
    try:
        found = _read(path, value, base)
    except _MisfitError as misfit:
        raise (misfit if misfit.path != path else _MisfitError(path, value, hint, misfit.kind)) from None
    if not all(bound.holds(found) for bound in bounds):
        raise _MisfitError(path, value, hint, ValueError)
    return found


def _fits(value, hint) -> bool:
    try:
        _read((), value, hint)
    except _MisfitError:
        return False
    return True


# ---- words -----------------------------------------------------------------------------------------------------------
def _options(hint) -> tuple:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _phrase(hint) -> str:
    options = _options(hint)
    if len(options) > 1:
        return " or ".join(map(_phrase, options))
    noun = _noun(hint)
    return (
        noun if hint in WORDS or get_origin(hint) is Literal else f"{'an' if noun[0] in 'aeiouAEIO' else 'a'} {noun}"
    )


def _noun(hint, s: str = "") -> str:
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(_noun(option, s) for option in parts)
    if kind is Annotated:
        before, behind = ([b.words for b in parts[1:] if b.before is place] for place in (True, False))
        return " ".join([*before, _noun(parts[0], s), *behind])
    if kind is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if kind in WORDS:
        return WORDS[kind]
    if kind in SEQUENCES:
        return f"list{s} of {_noun(parts[0], 's')}"
    if kind in (dict, Mapping):
        return f"mapping{s} of {_noun(parts[0], 's')} to {_noun(parts[1], 's')}" if parts else f"mapping{s}"
    return NOUNS.get(kind, getattr(kind, "__name__", str(kind))) + s
