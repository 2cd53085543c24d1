"""Sections: dataclasses that reject unknown names, values of a wrong type, and assignments to derived fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_type_hints

from config.field_type import convert, describe
from symbol.attributes import nearest

_UNSET = object()  # default of required fields: the slot stays empty until the config file sets it


def derived(source: str) -> Any:
    """Declare a field that `config.derive` fills. `source` names the fields to set instead."""
    return field(init=False, repr=False, compare=False, metadata={"derived": source})


def required(example: str) -> Any:
    """Declare a field without a default, which the config file must set. `example` is a line that sets it."""
    return field(default=_UNSET, repr=False, compare=False, metadata={"required": example})


@dataclass(frozen=True)
class Bound:
    """Accepted values of a field, and their description for error messages."""

    expected: str
    holds: Callable[[Any], bool]


def bounded(expected: str, holds: Callable[[Any], bool], default: Any) -> Any:
    """Declare a field with values for which `holds` is True; `expected` describes them.

    `config.check` applies the bound after the file and the overrides. None, where the annotation has it, is accepted.
    """
    return field(default=default, metadata={"bound": Bound(expected, holds)})


def at_least(lowest: float, default: Any) -> Any:
    """Declare a field with values of `lowest` or more."""
    expected = f"at least {lowest}" if lowest else "0 or more"
    return bounded(expected, lambda value: value >= lowest, default)


def above(limit: float, default: Any) -> Any:
    """Declare a field with values above `limit`."""
    return bounded(f"more than {limit}", lambda value: value > limit, default)


def between(lowest: float, highest: float, default: Any) -> Any:
    """Declare a field with values from `lowest` to `highest`, both included."""
    return bounded(f"{lowest} to {highest}", lambda value: lowest <= value <= highest, default)


def positive(default: tuple[float, ...]) -> Any:
    """Declare a field with one or more numbers above 0."""
    return bounded("positive numbers", lambda values: min(values, default=0) > 0, default)


class Section:
    """Base of every section, a `@dataclass(kw_only=True, slots=True)`.

    Setting a field raises ValueError for an unknown name, a derived field, and a value that does not fit the
    annotation. Reading raises AttributeError for an unknown name, and for a field that has no value yet.
    """

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __new__(cls, *_: Any, **given: Any) -> Self:
        for name in given:
            _check_settable(cls, name, f"{cls.__name__}.{name}")
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if value is not _UNSET:
            assign(self, name, value, f"{type(self).__name__}.{name}")

    def __setstate__(self, state: tuple[None, dict[str, Any]]) -> None:
        for name, value in state[1].items():  # pickle and copy restore derived fields too
            object.__setattr__(self, name, value)

    if not TYPE_CHECKING:  # type checkers see the declared fields only

        def __getattr__(self, name: str) -> Any:
            cls = type(self)
            known = cls.__dataclass_fields__
            if name not in known:
                raise AttributeError(_unknown(cls, name))
            metadata = known[name].metadata
            if "required" in metadata:
                raise AttributeError(
                    f"{cls.__name__}.{name} is not set; set it in the config file, such as {metadata['required']}"
                )
            raise AttributeError(
                f"{cls.__name__}.{name} follows from {metadata['derived']} and is not filled yet: "
                f"config.load.load_config fills it after the config file has run"
            )


def assign(section: Section, name: str, value: Any, place: str) -> None:
    """Set a field. Raises ValueError, with a message that starts with `place`, if the value is rejected."""
    cls = type(section)
    _check_settable(cls, name, place)
    try:
        value = convert(value, field_types(cls)[name])
    except TypeError:
        expected = describe(field_types(cls)[name])
        expected += _example(cls.__dataclass_fields__[name], expected)
        raise ValueError(f"{place}: expected {expected}; got {value!r:.200}") from None
    object.__setattr__(section, name, value)


def fill(section: Section, name: str, value: Any) -> None:
    """Set a derived field."""
    cls = type(section)
    assert "derived" in cls.__dataclass_fields__[name].metadata, (cls, name)
    object.__setattr__(section, name, convert(value, field_types(cls)[name]))


def leaves(section: Section, prefix: str = "") -> Iterator[tuple[str, Section, Field[Any]]]:
    """Yield (dotted key, section, field) for every field below `section` that is not itself a section."""
    for entry in fields(section):
        child = getattr(section, entry.name, None)
        if isinstance(child, Section):
            yield from leaves(child, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, section, entry


def field_types(cls: type[Section]) -> dict[str, Any]:
    """Return the annotations of a section's fields as types."""
    return get_type_hints(cls)


def _check_settable(cls: type[Section], name: str, place: str) -> None:
    if name not in cls.__dataclass_fields__:
        raise ValueError(f"{place}: {_unknown(cls, name)}")
    source = cls.__dataclass_fields__[name].metadata.get("derived")
    if source is not None:
        raise ValueError(f"{place}: {name} follows from {source} and cannot be set; set its source instead")


def _unknown(cls: type[Section], name: str) -> str:
    return f"{cls.__name__} has no field '{name}'; nearest: {nearest(name, cls.__dataclass_fields__)}"


def _example(entry: Field[Any], expected: str) -> str:
    if "required" in entry.metadata:
        return f", such as {entry.metadata['required']}"
    default = entry.default if entry.default_factory is MISSING else entry.default_factory()
    is_redundant = default is None or isinstance(default, Section) or repr(default) == expected
    return "" if is_redundant else f", such as {default!r}"
