"""The run-time type checker of the test suite: jaxtyping with beartype, with int accepted for float as PEP 484 says.

`jaxtyping.jaxtyped`, which its import hook puts on every function, binds a signature at each call and compiles two functions
where it is applied, inside other functions at their every call. Here it stays where a tensor's shape is told; other
annotations are beartype's alone, and a function without any is left as it is.
"""

import functools
import inspect
import typing

import jaxtyping
from beartype import BeartypeConf
from beartype import beartype as _beartype


beartype = _beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))
_jaxtyped = jaxtyping.jaxtyped


def _names_shapes(annotation) -> bool:
    """Whether an annotation is jaxtyping's, or has one inside; what cannot be told may."""
    if isinstance(annotation, str | typing.ForwardRef):
        return True
    of_arrays = isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray)
    return of_arrays or any(map(_names_shapes, _inside(annotation)))


def _inside(annotation) -> list:
    arguments = typing.get_args(annotation)
    return [a for argument in arguments for a in (argument if isinstance(argument, list) else [argument])]


def _checked(function=None, *, typechecker):
    """Stands for `jaxtyping.jaxtyped` wherever the import hook puts it."""
    if function is None:
        return functools.partial(_checked, typechecker=typechecker)
    if inspect.isclass(function) and hasattr(function.__init__, "__signature__"):
        return function  # `schema.checked` reads them already
    if inspect.isfunction(function):
        annotations = inspect.get_annotations(function).values()
        if not any(map(_names_shapes, annotations)):
            return typechecker(function) if annotations else function
    return _jaxtyped(function, typechecker=typechecker)


jaxtyping.jaxtyped = _checked
