"""The structure of symbol: the direction of imports, and a torch function for every operator."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import symbol
from symbol.ops import OPS
from symbol.torch_backend.registry import TORCH

ROOT = Path(symbol.__file__).parent
# Each imports only from those before it. The package itself is the face of all of them.
ORDER = ("attributes", "ops", "node", "shape", "json_format", "graph", "initializer", "layers", "passes", "memory")
BACKENDS = ("backend", "torch_backend", "onnx_backend")
WITHOUT_TORCH: set[str] = set()  # operators that the torch back end does not have


def name_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in ROOT.rglob("*.py")}


def imports(name):
    """Return the modules that a module imports anywhere in its text, in functions and for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found.update(submodules or {node.module})
    return found


def part(name):
    """Return the part of symbol that a module belongs to: "ops" for "symbol.ops.nn", "" for the package itself."""
    return name.split(".")[1] if "." in name else ""


def test_no_cycles():
    graph = {name: imports(name) & MODULES.keys() for name in MODULES}
    assert graph["symbol.graph"] > {"symbol.node", "symbol.shape"}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_direction_of_imports():
    assert {part(name) for name in MODULES} == {"", *ORDER, *BACKENDS}
    allowed = {name: {*ORDER[: index + 1]} for index, name in enumerate(ORDER)}
    allowed |= {"backend": {*ORDER, "backend"}, "": {*ORDER, *BACKENDS}}
    allowed |= {name: {*ORDER, "backend", name} for name in ("torch_backend", "onnx_backend")}
    for name in MODULES:
        wrong = {other for other in imports(name) & MODULES.keys() if part(other) not in allowed[part(name)]}
        assert not wrong, f"{name} imports {wrong}"


def test_only_back_ends_import_an_engine_and_kernels():
    others = [name for name in MODULES if part(name) not in ("torch_backend", "onnx_backend")]
    for name in MODULES:
        outside = {other.split(".")[0] for other in imports(name)}
        if part(name) == "":
            outside.discard("torch")  # the type that `lower` returns
        if name in others:
            assert not outside & {"torch", "onnx", "operator_cxx"}, name
        assert part(name) == "onnx_backend" or "onnx" not in outside, name
        assert part(name) != "onnx_backend" or "torch" not in outside, name
    imports_all = f"import importlib, sys; [importlib.import_module(name) for name in {others}]"
    code = f"{imports_all}; print([name for name in ('torch', 'onnx') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent, capture_output=True, text=True)
    assert run.stdout == "[]\n"


def test_every_package_says_what_it_is():
    for name, path in MODULES.items():
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert text, name
        assert path.name != "__init__.py" or "never" in text, f"{name} does not say what it never does"


def test_every_operator_has_a_torch_function():
    assert OPS.keys() == TORCH.lowerings.keys() | WITHOUT_TORCH
    assert not TORCH.lowerings.keys() & WITHOUT_TORCH
