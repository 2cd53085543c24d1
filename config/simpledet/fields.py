"""Reading what a SimpleDet file states: the fields of its classes, and whether two of them agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any


def fields(prefix: str, section: Any) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a section: a class or an instance of one, with sections within."""
    for name in dir(section):
        if name.startswith("_"):
            continue
        key, value = f"{prefix}.{name}", getattr(section, name)
        if class_of(value).__module__ == class_of(section).__module__:
            yield from fields(key, value)
        else:
            yield key, value


def class_of(value: Any) -> type:
    return value if isinstance(value, type) else type(value)


def agree(key: str, value: Any, other: str, expected: Any) -> None:
    """Raises ValueError, which names both places, where two statements of one thing differ."""
    if _is_same(value, expected):
        return
    raise ValueError(
        f"{key} is {value!r:.200}, but {other} is {expected!r:.200}: they are one setting; make them equal"
    )


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_is_same, a, b))
    if isinstance(a, float | int) and isinstance(b, float | int):
        return math.isclose(a, b, rel_tol=1e-9)
    return bool(a == b)


def number(value: Any, place: str, or_zero: bool = False) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (value > 0 or (or_zero and value == 0)):
        expected = "0 or a number above it" if or_zero else "a number above 0"
        raise ValueError(f"{place}: expected {expected}, got {value!r:.200}")
    return float(value)


def shown(value: Any) -> str:
    """For a note: a function by its name, without its address."""
    return getattr(value, "__name__", None) or f"{value!r:.100}"


def is_identity(process: Callable[..., Any], arguments: int) -> bool:
    """Does a function give its first argument back?"""
    probe: list[Any] = []
    try:
        return process(*(probe, probe)[:arguments]) is probe
    except Exception:  # it wanted more of the argument, so it does something with it
        return False
