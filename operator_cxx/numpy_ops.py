"""Stands in for the compiled extension of this name, which Python prefers to this file, where it has not been built."""

raise ImportError(
    "operator_cxx.numpy_ops is not built for this Python: make ops, or pip install cython and python3 setup.py "
    "build_ext --inplace"
)
