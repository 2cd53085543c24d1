"""Stand-ins for the names that SimpleDet's config files import. They only record the arguments of each call.

A SimpleDet file builds its graph with `Detector().get_train_symbol(Backbone(BackboneParam), ...)` and its input with
`[ReadRoiRecord(None), Norm2DImage(NormParam), ...]`. `config.simpledet.translate` reads the recorded calls. The
stand-ins are provided through the file's own `__import__` and are not visible to other modules.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_SUPPORTED = (
    "supported SimpleDet files use the detector RetinaNet; one of the backbones ResNetV1bFPN, MSRAResNet<depth>V1bFPN, "
    "MSRAResNet<depth>V1FPN; one of the necks NASFPNNeck, TopDownBottomUpFPNNeck, PAFPNNeckP3P7, "
    "RetinaNetNeckWithBN, RetinaNetNeck; and one of the heads RetinaNetHeadWithBN, RetinaNetHead"
)
MODULES = (
    "mxnext.complicate",
    "models.retinanet.builder",
    "models.retinanet.input",
    "models.retinanet.metric",
    "models.NASFPN.builder",
    "models.FPG.builder",
    "models.NASFPN.input",
    "core.detection_input",
    "core.detection_metric",
)
_PACKAGES = {module[: i + 1] for module in MODULES for i in range(len(module)) if module[i + 1 : i + 2] == "."}
_NECK_NORM = re.compile(r"^(S\d+_P\d_\d+_bn)(?=_(?!neck)|$)")
_SIMPLEDETS = ("mxnext", "models", "symbol", "core", "utils", "operator_py")


@dataclass(frozen=True)
class Normalizer:
    """Arguments of `mxnext.complicate.normalizer_factory`. The defaults are mxnext's."""

    type: str = "local"
    ndev: int | None = None
    eps: float = 1e-5
    mom: float = 0.9
    lr_mult: float = 1.0
    wd_mult: float = 1.0


@dataclass(frozen=True, eq=False)
class Graph:
    """A recorded call of a detector's get_train_symbol or get_test_symbol."""

    detector: Part
    parts: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Part:
    """A recorded instance of a SimpleDet class: the module and name of the class, and its arguments."""

    module: str
    name: str
    args: tuple[Any, ...]

    def get_train_symbol(self, *parts: Any) -> Graph:
        return Graph(self, parts)

    def get_test_symbol(self, *parts: Any) -> Graph:
        return Graph(self, parts)

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class _Class:
    """The stand-in for a SimpleDet class."""

    module: str
    name: str

    def __call__(self, *args: Any, **named: Any) -> Part:
        return Part(self.module, self.name, (*args, *named.values()))

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        raise ValueError(f"a class defined in the file, derived from {self.name}, is not supported; {_SUPPORTED}")


@dataclass(frozen=True)
class _Module:
    """The stand-in for a module or package. Every name of a module is a class."""

    path: str

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        path = f"{self.path}.{name}"
        if path in MODULES or path in _PACKAGES:
            return _Module(path)
        if self.path not in MODULES:
            raise ValueError(unsupported(path))
        if self.path == "mxnext.complicate":
            if name != "normalizer_factory":
                raise ValueError(unsupported(path))
            return Normalizer
        return _Class(self.path, name)


def is_simpledet(tree: ast.Module) -> bool:
    """Return True for a SimpleDet config file: it imports mxnext, or its get_config returns a tuple."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mxnext":
            return True
        if isinstance(node, ast.Import) and any(one.name.partition(".")[0] == "mxnext" for one in node.names):
            return True
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "get_config":
            return any(isinstance(one, ast.Return) and isinstance(one.value, ast.Tuple) for one in ast.walk(node))
    return False


def file_builtins() -> dict[str, Any]:
    """Return `__builtins__` for a SimpleDet file: Python's, with an `__import__` that provides the stand-ins.

    Importing a SimpleDet module that has no stand-in and does not exist in this project raises ValueError.
    """
    return {**vars(builtins), "__import__": _import}


def declared_classes(tree: ast.Module) -> dict[str, tuple[str, ...]]:
    """Return the classes that get_config declares, with the names assigned in each."""
    found = {}
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and function.name == "get_config":
            for node in function.body:
                if isinstance(node, ast.ClassDef):
                    targets = [
                        target for one in ast.walk(node) if isinstance(one, ast.Assign) for target in one.targets
                    ]
                    found[node.name] = tuple(target.id for target in targets if isinstance(target, ast.Name))
    return found


def _import(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    if level == 0 and (name in MODULES or name in _PACKAGES):
        return _Module(name if fromlist else name.partition(".")[0])
    real: Callable[..., Any] = builtins.__import__
    try:
        return real(name, globals, locals, fromlist, level)
    except ModuleNotFoundError:
        if level == 0 and name.partition(".")[0] in _SIMPLEDETS:
            raise ValueError(unsupported(name)) from None
        raise


def unsupported(name: str) -> str:
    """Return the error message for a SimpleDet feature that is not supported."""
    return f"{name} is not supported; {_SUPPORTED}"


def neck_norm_name(name: str) -> str:
    """Return this project's name of a neck's BatchNorm or its parameters: S7_P6_7_bn_neck for S7_P6_7_bn.

    Other names are returned unchanged.
    """
    return _NECK_NORM.sub(r"\1_neck", name)
