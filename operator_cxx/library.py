"""Load the kernel libraries and call their functions.

`make ops` (or `python3 setup.py build_ext --inplace`) builds the libraries. Without them, the operators run in plain
torch, with the same results. Environment, read at import:

    NECKLACE_OPS            reference: use plain torch everywhere; compiled: fail if a library cannot be loaded
    NECKLACE_CUDA           0: neither build nor use the CUDA kernels
    NECKLACE_OPS_LIBRARY    path of a CPU library to use instead of built/necklace_cpu.so, for example with a sanitizer
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from operator_cxx.build import HERE, library_path, read_info, require_usable

DTYPES: Mapping[torch.dtype, int] = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

_CTYPES: Mapping[str, Any] = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "intptr_t": ctypes.c_ssize_t,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "const char*": ctypes.c_char_p,
}


def _declarations() -> dict[str, tuple[Any, list[Any]]]:
    """Return the result and argument types of every function in necklace.h."""
    header = (HERE / "include" / "necklace.h").read_text()
    text = re.sub(r"/\*.*?\*/|^#.*?$", "", header, flags=re.DOTALL | re.MULTILINE)
    found = {}
    for result, name, arguments in re.findall(r"NK_EXPORT ([\w ]+\*?) ?(nk_\w+)\(([^)]*)\)", text):
        types = [argument.strip().rpartition(" ")[0] for argument in arguments.split(",") if argument.strip() != "void"]
        pointers = [ctypes.c_void_p if name.endswith("*") else _CTYPES[name] for name in types]
        found[name] = (_CTYPES[result.strip()], pointers)
    return found


class Kernels:
    """A kernel library, with the functions of `necklace.h` by name without `nk_`.

    Tensors are passed as their addresses, None as NULL, and tuples of integers as arrays of int64. The object is
    immutable, so threads may share it. Raises ValueError if the library was built from other sources or for another
    processor, OSError if it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        self.info = read_info(path)
        require_usable(self.info, str(path))
        library = ctypes.CDLL(str(path))
        self._functions = {}
        for name, (result, arguments) in _declarations().items():
            try:
                function = getattr(library, name)
            except AttributeError as error:
                raise ValueError(f"{path} has no {name}: rebuild it with make ops") from error
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function

    def run(self, name: str, like: Tensor, *arguments: Any) -> None:
        """Call a function on the device of `like`: on its current stream, or with torch's number of CPU threads."""
        assert all(a.device == like.device for a in arguments if isinstance(a, Tensor)), f"{name}: devices differ"
        converted = [_address(argument) for argument in arguments]
        cuda = like.device.type == "cuda"
        with torch.cuda.device(like.device) if cuda else nullcontext():
            where = torch.cuda.current_stream().cuda_stream if cuda else torch.get_num_threads()
            status = self._functions[f"nk_{name}"](*converted, where)
        if status:
            message = self._functions["nk_error_string"](status).decode()
            raise RuntimeError(
                f"{name}: launching on {like.device} failed: {message} ({status}); the library was built for "
                f"{self.info['target']}"
            )

    def workspace(self, name: str, like: Tensor, *sizes: int) -> Tensor:
        """Return uninitialised scratch memory on the device of `like` for an operator with these sizes."""
        size = self._functions[f"nk_{name}_workspace"](*sizes)
        return torch.empty(size, dtype=torch.uint8, device=like.device)


def _address(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, tuple):
        return (ctypes.c_int64 * len(argument))(*argument)
    return argument


def _load() -> tuple[dict[str, Kernels], list[str]]:
    """Return the libraries by device type, and lines for the log."""
    setting = os.environ.get("NECKLACE_OPS", "")
    if setting not in ("", "reference", "compiled"):
        raise ValueError(f"NECKLACE_OPS: expected reference, compiled or nothing, got {setting!r}")
    if setting == "reference":
        return {}, ["operators: plain torch, because NECKLACE_OPS=reference"]
    found, notes = {}, []
    for kind in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        if kind == "cuda" and os.environ.get("NECKLACE_CUDA") == "0":
            notes.append("operators: plain torch on cuda, because NECKLACE_CUDA=0")
            continue
        other = os.environ.get("NECKLACE_OPS_LIBRARY") if kind == "cpu" else None
        path = Path(other) if other else library_path(kind)
        try:
            if not path.exists():
                raise ValueError(f"{path.name} is not built (make ops builds it)")
            found[kind] = Kernels(path)
            notes.append(f"operators: compiled for {kind} ({found[kind].info['target']})")
        except (ValueError, OSError) as error:
            if setting == "compiled":
                raise RuntimeError(f"NECKLACE_OPS=compiled, but the operators for {kind}: {error}") from error
            notes.append(f"operators: plain torch on {kind}, slower: {error}")
    return found, notes


# The libraries in use by device type ("cpu", "cuda"), and lines for the log about them.
loaded, notes = _load()


def serves(tensor: Tensor, *dtypes: torch.dtype) -> bool:
    """Return True if a library is loaded for the tensor's device and its type is one of `dtypes`.

    Default of `dtypes`: all types of the C interface.
    """
    return tensor.device.type in loaded and tensor.dtype in (dtypes or tuple(DTYPES))
