"""The functions of the ONNX back end, by operator."""

from symbol.backend import Backend

ONNX = Backend("ONNX")
lowers = ONNX.lowers
