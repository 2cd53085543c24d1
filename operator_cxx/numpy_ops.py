"""Placeholder for the compiled extension of the same name, which takes precedence over this file once it is built."""

raise ImportError(
    "operator_cxx.numpy_ops is not built for this Python: make ops, or pip install cython and python3 setup.py "
    "build_ext --inplace"
)
