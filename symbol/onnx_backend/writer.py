"""Writer of an ONNX graph: nodes, constants, inputs and outputs under unique names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper

from symbol.ops import Shape

OPSET = 17  # read by every engine of today; later ones add nothing that is needed here
_IR_VERSION = 8  # of the same release of ONNX


class Value(NamedTuple):
    """A tensor of the graph. A dimension -k is k * N, a multiple of the batch size, which is free."""

    name: str
    shape: Shape
    dtype: str = "float32"  # NumPy's name


class Writer:
    """A graph in the making. Names that are asked for are kept unless they are taken."""

    def __init__(self) -> None:
        self.scope = "graph"  # prefix of the names of nodes and outputs that are not given
        self._nodes: list[Any] = []
        self._initializers: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._taken: set[str] = set()
        self._constants: dict[tuple[str, Shape, bytes], str] = {}

    def op(self, op_type: str, *inputs: str | Value, name: str | None = None, **attrs: Any) -> str:
        """Add a node of one output; return the name of the output."""
        return self.ops(op_type, 1, *inputs, name=name, **attrs)[0]

    def ops(
        self, op_type: str, num_output: int, *inputs: str | Value, name: str | None = None, **attrs: Any
    ) -> list[str]:
        """Add a node; return the names of its outputs. An empty name is an optional input that is not given."""
        outputs = [self._unique(name or f"{self.scope}/{op_type}") for _ in range(num_output)]
        names = [one.name if isinstance(one, Value) else one for one in inputs]
        self._nodes.append(helper.make_node(op_type, names, outputs, name=outputs[0], **attrs))
        return outputs

    def constant(self, value: Any, dtype: type | str = np.float32, name: str | None = None) -> str:
        """Return the name of a constant; equal ones are stored once unless they are named."""
        array = np.ascontiguousarray(value, dtype=dtype)
        array = array.reshape(np.shape(value))  # ascontiguousarray makes a scalar one-dimensional
        key = (array.dtype.str, array.shape, array.tobytes())
        if name is not None or key not in self._constants:
            unique = self._unique(name or "constant")
            self._initializers.append(numpy_helper.from_array(array, unique))
            if name is not None:
                return unique
            self._constants[key] = unique
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """Return the name of a constant int64 vector."""
        return self.constant(values, np.int64)

    def input(self, name: str, dtype: str, shape: Shape) -> Value:
        """Declare an input of the graph."""
        assert name not in self._taken, f"two inputs or values are named {name}"
        self._taken.add(name)
        self._inputs.append(_value_info(name, shape, dtype))
        return Value(name, shape, dtype)

    def output(self, name: str, value: Value) -> None:
        """Declare an output of the graph under this name."""
        unique = self.op("Identity", value, name=name)
        if unique != name:
            raise ValueError(f"an output is named {name!r}, as another value of the graph is: rename that node")
        self._outputs.append(_value_info(*value._replace(name=name)))

    def model(self, name: str, metadata: Mapping[str, str]) -> ModelProto:
        """Return the checked model, its nodes in the order in which they were added."""
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, self._initializers)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="necklace")
        helper.set_model_props(model, dict(metadata))
        checker.check_model(model, full_check=True)
        return model

    def _unique(self, name: str) -> str:
        unique, number = name, 1
        while unique in self._taken:
            number += 1
            unique = f"{name}_{number}"
        self._taken.add(unique)
        return unique


def _value_info(name: str, shape: Shape, dtype: str) -> Any:
    sides: Sequence[int | str] = [side if side > 0 else ("N" if side == -1 else f"{-side}N") for side in shape]
    return helper.make_tensor_value_info(name, tensor_type(dtype), sides)


def tensor_type(dtype: str) -> int:
    """Return ONNX's number of a type, by NumPy's name or bfloat16."""
    return int(TensorProto.BFLOAT16) if dtype == "bfloat16" else int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
