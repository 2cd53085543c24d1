"""Overrides, `--set Section.field=value`: changes to a config before any field is derived."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any, get_origin

from config.field_type import convert
from config.image_set import ImageSet
from config.schema import Config
from config.section import Section, assign, field_types, leaves
from symbol.attributes import nearest

_GPUS = "KvstoreParam.gpus"


def apply_overrides(config: Config, overrides: Sequence[str]) -> None:
    """Apply each `Section.field=value` in order; later overrides take precedence.

    A value is a Python literal, a bare word (a string), or `ImageSet(...)`. A tuple field also accepts `a,b`, one
    bare value, and no value (an empty tuple); `KvstoreParam.gpus=cpu` is an empty tuple too.

    Raises ValueError, naming the override and the remedy, for an unknown key, a wrong type and a derived field.
    """
    for override in overrides:
        place = f"--set {override:.200}"
        key, equals, text = override.partition("=")
        key, text = key.strip(), text.strip()
        if not (key and equals):
            raise ValueError(f"{place}: expected Section.field=value, such as NeckParam.num_stage=3")
        section, name = _find(config, key, place)
        hint = field_types(type(section))[name]
        if not text and get_origin(hint) is not tuple:
            raise ValueError(f"{place}: expected a value after '=', such as None or ''")
        assign(section, name, _parse(key, text, hint), place)


def _find(config: Config, key: str, place: str) -> tuple[Section, str]:
    """Return the section that holds a dotted key, and the field's name."""
    *path, name = key.split(".")
    section: Section = config
    for depth, step in enumerate(path, start=1):
        child = getattr(section, step, None) if step in section.__dataclass_fields__ else None
        if not isinstance(child, Section):
            if step in section.__dataclass_fields__:
                whole = ".".join(path[:depth])
                raise ValueError(f"{place}: {whole} is a value without fields; set all of it with {whole}=...")
            raise ValueError(f"{place}: unknown key '{key:.200}'; nearest: {_nearest_keys(config, key)}")
        section = child
    if name not in section.__dataclass_fields__:
        raise ValueError(f"{place}: unknown key '{key:.200}'; nearest: {_nearest_keys(config, key)}")
    target = getattr(section, name, None)
    if isinstance(target, Section):
        below = ", ".join(_settable(target, f"{key}.")) or "none, all of them are derived"
        raise ValueError(f"{place}: {key} is a section; set one of its fields: {below}")
    return section, name


def _nearest_keys(config: Config, key: str) -> str:
    """Return the closest keys among those with the same field name; if there are none, among all keys."""
    keys = _settable(config)
    name = key.rpartition(".")[2]
    same = [leaf for leaf in keys if leaf.rpartition(".")[2] == name]
    return nearest(key, same or keys, 3)


def _settable(section: Section, prefix: str = "") -> list[str]:
    return [key for key, _, entry in leaves(section, prefix) if "derived" not in entry.metadata]


def _parse(key: str, text: str, hint: Any) -> Any:
    """Return the first interpretation of the text that fits the annotation, else the first of all."""
    readings = _readings(text)
    if get_origin(hint) is tuple:
        if not text or (key == _GPUS and text == "cpu"):
            return ()
        if readings == [text]:
            readings = [tuple(_readings(item.strip())[0] for item in text.split(","))]
        readings += [(reading,) for reading in readings]
    for reading in readings:
        try:
            return convert(reading, hint)
        except TypeError:
            continue
    return readings[0]


def _readings(text: str) -> list[Any]:
    """Return the interpretations of a text: a literal, else the text. A number can also be a string (a name 2024)."""
    try:
        value = _literal(ast.parse(text, mode="eval").body)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return [text]
    return [value, text] if type(value) in (int, float) else [value]


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_literal(item) for item in node.elts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ImageSet":
        given = {keyword.arg or "**": ast.literal_eval(keyword.value) for keyword in node.keywords}
        return ImageSet(*map(ast.literal_eval, node.args), **given)
    return ast.literal_eval(node)
