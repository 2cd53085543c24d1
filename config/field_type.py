"""Checks and conversions of values against field annotations, for the annotations used in `config.schema`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_WORDS = {
    int: "an integer",
    float: "a finite number",
    bool: "True or False",
    str: "a string",
    type: "a class",
    NoneType: "None",
}


def convert(value: Any, hint: Any) -> Any:
    """Return the value converted to the annotated type: int to float, list to tuple.

    Raises TypeError if it does not fit.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        return _convert_union(value, args)
    if origin is Literal:
        return _require(value, any(type(value) is type(choice) and value == choice for choice in args))
    if origin is tuple:
        return _convert_tuple(value, args)
    if origin is list:
        return [convert(item, args[0]) for item in _require(value, isinstance(value, list))]
    if origin is dict:
        _require(value, isinstance(value, dict))
        return {convert(k, args[0]): convert(v, args[1]) for k, v in value.items()}
    if origin is Callable:
        return _require(value, callable(value))
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(_require(value, number and abs(value) <= sys.float_info.max))  # not NaN, and no int beyond floats
    if hint is int:
        return _require(value, isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)
    return _require(value, isinstance(value, hint))


def describe(hint: Any) -> str:
    """Return a description of the accepted values, for error messages."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(repr(choice) for choice in args)
    if origin is tuple:
        number = "" if args[-1] is Ellipsis else f"{len(args)} values, "
        return f"a tuple ({number}each {describe(args[0])})"
    if origin is list:
        return "a list"
    if origin is dict:
        return f"a dict ({describe(args[0])} to {describe(args[1])})"
    if origin is Callable:
        return "a function or a class"
    return _WORDS.get(hint) or f"a {hint.__name__}"


def _require(value: Any, fits: bool) -> Any:
    if not fits:
        raise TypeError
    return value


def _convert_union(value: Any, hints: tuple[Any, ...]) -> Any:
    for hint in hints:
        try:
            return convert(value, hint)
        except TypeError:
            continue
    raise TypeError


def _convert_tuple(value: Any, hints: tuple[Any, ...]) -> tuple[Any, ...]:
    _require(value, isinstance(value, tuple | list))
    if hints[-1] is Ellipsis:
        return tuple(convert(item, hints[0]) for item in value)
    _require(value, len(value) == len(hints))
    return tuple(convert(item, hint) for item, hint in zip(value, hints, strict=True))
