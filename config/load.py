"""Loading: from a config file to a complete config, and its text form."""

from __future__ import annotations

import ast
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from config.check import check
from config.derive import derive
from config.image_set import ImageSet
from config.overrides import apply_overrides
from config.schema import Config, Transform
from config.section import fill, leaves
from config.simpledet.names import file_builtins, is_simpledet
from config.simpledet.settle import Translation
from config.simpledet.translate import translate
from symbol import Symbol
from symbol.attributes import nearest


def load_config(path: str | Path, is_train: bool, overrides: Sequence[str] = ()) -> Config:
    """Return the config of a file's `get_config(is_train)`, with `overrides` applied, checked and completed.

    path: a .py file, such as config/NASFPN/retina_r50v1b_nasfpn_640_7@256_25epoch.py, or a SimpleDet config file.
    is_train: selects the transforms, image sets and input names of training, else those of testing.
    overrides: `Section.field=value`, see `config.overrides`; applied before any field is derived.

    Raises FileNotFoundError for a missing file, and for missing annotations if the class count needs them;
    ValueError, with the remedy, for a file that fails to run and for an invalid value.
    """
    config, translation = _run_config_file(str(path), is_train)
    apply_overrides(config, overrides)
    if translation is not None:
        translation.before_check(overrides)
    check(config)
    derive(config, Path(path).stem, is_train)
    if translation is not None:
        translation.after_derive()
    fill(config, "source", str(path))
    fill(config.TestParam, "image_set", config.DatasetParam.image_set if not is_train else _test_sets(str(path)))
    fill(config, "notes", [] if translation is None else translation.notes)
    return config


def _test_sets(path: str) -> tuple[str | ImageSet, ...]:
    """Return the image sets that the file tests on, whatever a training overrides."""
    config, _ = _run_config_file(path, is_train=False)
    return config.DatasetParam.image_set


def format_config(config: Config) -> str:
    """Return the complete tree, one line `Section.field = value` per field.

    Notes, derived fields and classes are comments. The other lines are valid overrides, which reproduce the config.
    The input size of a SimpleDet file is shown after padding; a note states the size that images are scaled to.
    """
    lines = [f"# note: {note}" for note in config.notes]
    for key, section, entry in leaves(config):
        if key in ("notes", "source"):
            continue
        shown = f"{key} = {_show(getattr(section, entry.name))}"
        lines.append(f"# {shown}" if {"derived", "required"} & entry.metadata.keys() else shown)
    return "\n".join(lines) + "\n"


def _show(value: Any) -> str:
    if isinstance(value, Symbol):
        return f"a graph of {len(value.nodes())} nodes"
    if isinstance(value, Transform):
        return f"sample {_show(value.sample)}, batch {_show(value.batch)}"
    if isinstance(value, list):
        return ", ".join(type(item).__name__ for item in value) or "nothing"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    return repr(value)


def _run_config_file(path: str, is_train: bool) -> tuple[Config, Translation | None]:
    tree = _parse_config_file(path)
    get_config = _read_config_file(path, tree)
    try:
        config = get_config(is_train)
        translation = translate(config, is_train, tree) if isinstance(config, tuple) and is_simpledet(tree) else None
    except Exception as error:
        raise ValueError(f"{_locate(path, error)}: {_message(error)}") from error
    if translation is not None:
        return translation.config, translation
    if not isinstance(config, Config):
        raise ValueError(
            f"{path}: get_config(is_train) must return a config.schema.Config, got {type(config).__name__}; "
            f"start from a recipe such as config.NASFPN.recipe.retina_25epoch(is_train), change it and return it"
        )
    return config, None


def _parse_config_file(path: str) -> ast.Module:
    try:
        return ast.parse(Path(path).read_bytes(), path)
    except FileNotFoundError:
        folder = Path(path).parent
        message = f"config file {path} does not exist"
        if not folder.is_dir():
            raise FileNotFoundError(f"{message}, nor does the folder {folder}") from None
        raise FileNotFoundError(f"{message}; nearest in {folder}: {_files(folder, Path(path).name)}") from None
    except IsADirectoryError:
        found = _files(Path(path))
        raise ValueError(f"{path}: expected a config file (.py), got a folder, which contains {found}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{_locate(path, error)}: {_message(error)}") from error


def _read_config_file(path: str, tree: ast.Module) -> Callable[[bool], Any]:
    """Return the file's get_config. The file is compiled, not imported: its name need not be an identifier ('@')."""
    module = ModuleType(Path(path).stem)
    module.__file__ = path
    if is_simpledet(tree):
        module.__dict__["__builtins__"] = file_builtins()
    try:
        exec(compile(tree, path, "exec"), module.__dict__)
    except Exception as error:
        raise ValueError(f"{_locate(path, error)}: {_message(error)}") from error
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ValueError(f"{path}: expected a function get_config(is_train: bool) -> Config, found none")
    return get_config


def _locate(path: str, error: Exception) -> str:
    """Return the file's path, with the line that failed if there is one."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"{path}, line {lines[-1]}" if lines else path


def _message(error: Exception) -> str:
    """Return the error's text. Messages of sections are complete; Python's own errors are prefixed with their type."""
    if isinstance(error, SyntaxError):
        return f"not valid Python: {error.msg}"
    plain = isinstance(error, ValueError | AttributeError)
    return str(error) if plain else f"{type(error).__name__}: {error}"


def _files(folder: Path, name: str = "") -> str:
    """Return the config files of a folder with names closest to `name`, without recipes and other modules."""
    found = [file.name for file in sorted(folder.glob("*.py")) if re.search(rb"^def get_config\b", _read(file), re.M)]
    return nearest(name, found) or "no config file (.py, with a function get_config)"


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # a folder with this name, or a broken link
        return b""
