"""Reading a SimpleDet file: the fields of its classes, and consistency between two of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any


def fields(prefix: str, section: Any) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of a section, which is a class or an instance of one and may contain sections."""
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
    """Raise ValueError, naming both keys, if two fields for the same setting differ."""
    if _is_same(value, expected):
        return
    raise ValueError(
        f"{key} is {value!r:.200}, but {other} is {expected!r:.200}: both are the same setting; make them equal"
    )


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_is_same, a, b))
    if isinstance(a, float | int) and isinstance(b, float | int):
        return math.isclose(a, b, rel_tol=1e-9)
    return bool(a == b)


def number(value: Any, place: str, or_zero: bool = False) -> float:
    """Return a positive number, with `or_zero` also 0, as a float. Raises ValueError for other values."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (value > 0 or (or_zero and value == 0)):
        expected = "a number of 0 or more" if or_zero else "a number above 0"
        raise ValueError(f"{place}: expected {expected}, got {value!r:.200}")
    return float(value)


def shown(value: Any) -> str:
    """Return a value's text for a note: a function by its name, without its address."""
    return getattr(value, "__name__", None) or f"{value!r:.100}"


def is_identity(process: Callable[..., Any], arguments: int) -> bool:
    """Return True if a function returns its first argument."""
    probe: list[Any] = []
    try:
        return process(*(probe, probe)[:arguments]) is probe
    except Exception:  # it uses the argument, so it is not the identity
        return False
