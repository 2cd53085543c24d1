"""The ONNX back end: a test graph as nodes of standard ONNX operators, a function per operator. Only it needs onnx.

It never rewrites a graph: `symbol.passes` does. A function takes the writer, the node's inputs as `Value`s in order and
its full attributes by name, and returns the name of its output, or a tuple of names. `out_shape` is the shape of its
first output. Shapes are as in `Value`: -k is k * N.
"""

from symbol.onnx_backend import detection, elementwise, layout, nn
from symbol.onnx_backend.lowering import emit, export
from symbol.onnx_backend.writer import OPSET, Value, Writer

__all__ = ["OPSET", "Value", "Writer", "detection", "elementwise", "emit", "export", "layout", "nn"]
