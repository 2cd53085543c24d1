"""The operators as MXNet 1.9's own: `_contrib_FocalLoss` and its siblings, in mx.nd.contrib and mx.sym.contrib."""

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
    """The module mxnet, with the operators loaded into it.

    Raises ValueError where there is no MXNet 1.9 or the operators were not built for it, saying what to do.
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
    os.environ.setdefault("MXNET_SUBGRAPH_VERBOSE", "0")  # a line on the console for every graph
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MXNet is older than what NumPy and Python have deprecated since
        mx = importlib.import_module("mxnet")
    mx.library.load(str(path), verbose=False)
    return mx
