"""The operators for MXNet 1.9: `_contrib_FocalLoss` and its siblings, in mx.nd.contrib and mx.sym.contrib.

The binding adapts attributes, shapes and gradients and calls the kernel libraries; it contains no kernels of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from functools import cache
from typing import Any

from operator_cxx.build import library_path, read_info


@cache
def load_mxnet() -> Any:
    """Return the module mxnet with the operators loaded into it.

    Raises ValueError if MXNet is not installed or the operators were not built for it.
    """
    if importlib.util.find_spec("mxnet") is None:
        raise ValueError("MXNet is not installed here: make mxnet, then run with .venv-mxnet/bin/python")
    from operator_cxx.mxnet_ops.build import expected_sources

    path = library_path("mxnet")
    for name, sources in (("mxnet", expected_sources()), ("cpu", None)):
        info = read_info(library_path(name))
        if not info or (sources and info["sources"] != sources):
            state = "built from other sources" if info else "not built"
            raise ValueError(f"{library_path(name).name} is {state}: make ops, then make mxnet")
    os.environ.setdefault("MXNET_SUBGRAPH_VERBOSE", "0")  # else MXNet prints a line per graph
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MXNet uses what NumPy and Python have deprecated since its release
        mx = importlib.import_module("mxnet")
    mx.library.load(str(path), verbose=False)
    return mx
