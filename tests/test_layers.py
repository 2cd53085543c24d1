"""Imports point one way: scripts -> core -> config -> models -> symbol -> operator_cxx."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("operator_cxx", "symbol", "models", "config", "core", "utils")  # each may import those before it
# Recipes name transforms, which core defines; SimpleDet's files are recipes too, and count iterations per epoch.
RECIPES = ("config/NASFPN/recipe.py", "config/demo/recipe.py", "config/simpledet/transforms.py")
COUNTS_IMAGES = "config/simpledet/schedule.py"


def modules() -> list[Path]:
    return sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py") if "build" not in path.parts)


def imported(path: Path) -> Iterator[str]:
    """Return the modules that a file imports at run time, also inside functions; not those for type checking alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{one.name}" for one in node.names)
        elif isinstance(node, ast.Import):
            yield from (one.name for one in node.names)


def layer_of(name: str) -> int:
    first = name.partition(".")[0]
    return LAYERS.index(first) if first in LAYERS else -1


@pytest.mark.parametrize("layer", LAYERS)
def test_no_module_imports_a_layer_above_its_own(layer: str) -> None:
    upward = {}
    for path in modules():
        where = path.relative_to(ROOT).as_posix()
        above = {name.partition(".")[0] for name in imported(path) if layer_of(name) > layer_of(layer)}
        if where.startswith(f"{layer}/") and above and where not in (*RECIPES, COUNTS_IMAGES):
            upward[where] = above
    assert upward == {}


def test_only_scripts_import_scripts() -> None:
    for path in modules():
        scripts = {name for name in imported(path) if name.partition(".")[0] in ("detection_train", "detection_test")}
        assert not scripts or path.parts[-2] == "utils" or "utils" in path.parts, path


def test_imports_have_no_cycle() -> None:
    paths = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in modules()}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    needs = {name: {one for one in imported(path) if one in paths and one != name} for name, path in paths.items()}
    while True:  # remove modules that import no other or that no other imports, until a cycle is left or nothing
        ends = {name for name in needs if not needs[name] & needs.keys()}
        ends |= needs.keys() - {one for each in needs.values() for one in each}
        if not ends:
            break
        needs = {name: each for name, each in needs.items() if name not in ends}
    assert sorted(needs) == []
