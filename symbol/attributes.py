"""Typed operator attributes, read from and written in MXNet's string forms: "True", "(3, 3)", "1e-05", "None"."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

REQUIRED: Any = object()
DTYPES = ("float32", "float64", "float16", "uint8", "int32", "int8", "int64")


def nearest(name: str, known: Iterable[str], count: int = 5) -> str:
    """Return the known names most like `name`, for an error message."""
    known = list(known)
    return ", ".join(difflib.get_close_matches(name, known, count, 0.4) or known[:count])


@dataclass(frozen=True, slots=True)
class Attr:
    """One attribute of an operator: its kind, MXNet's default, and for an enum its values.

    always_written: MXNet has no default of its own, so its JSON needs the attribute.
    """

    kind: Literal["int", "float", "bool", "ints", "floats", "enum", "string"]
    default: Any = REQUIRED
    choices: tuple[str, ...] = ()
    always_written: bool = False

    def parse(self, value: Any) -> Any:
        """Return the typed value of a Python value or of MXNet's string.

        Raises ValueError naming the expected type.
        """
        if value is None or (isinstance(value, str) and value == "None"):
            if self.default is None:
                return None
            raise ValueError(f"expected {self.expected()}, got None")
        if self.kind == "enum":
            text = getattr(value, "__name__", None) or str(value)  # numpy.float32 names itself
            if text not in self.choices:
                raise ValueError(f"expected {self.expected()}, got {value!r}")
            return text
        if self.kind == "string":
            return str(value)
        try:
            return self._parse_number(_literal(value) if isinstance(value, str) else value)
        except (TypeError, ValueError, SyntaxError, OverflowError, RecursionError, MemoryError):
            raise ValueError(f"expected {self.expected()}, got {value!r}") from None

    def _parse_number(self, value: Any) -> Any:
        if self.kind == "bool":
            if value not in (True, False):
                raise ValueError
            return bool(value)
        if self.kind == "int":
            return _integer(value)
        if self.kind == "float":
            return float(value)
        items = value if isinstance(value, (tuple, list)) else (value,)
        return tuple(_integer(v) if self.kind == "ints" else float(v) for v in items)

    def expected(self) -> str:
        """Return the accepted values in words, for an error message."""
        words = {
            "int": "an integer",
            "float": "a number",
            "bool": "True or False",
            "ints": "a tuple of integers",
            "floats": "a tuple of numbers",
            "string": "a string",
            "enum": "one of " + ", ".join(self.choices),
        }
        return words[self.kind] + (" or None" if self.default is None else "")


def _integer(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value or abs(value) >= 2**63:
        raise ValueError
    return int(value)


def _literal(text: str) -> Any:
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if len(text) > 1000:
        raise ValueError
    return ast.literal_eval(text)


def format_value(value: Any) -> str:
    """Return a typed value as MXNet's Python front end writes it."""
    return str(value)
