"""The row of an operator: what is known of it, whatever computes it.

Everything here is a function of a node's attributes, shapes and dtypes, so that shape inference, passes, memory
planning, reports and every back end read the same facts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from symbol.attributes import REQUIRED, Attr, nearest

Shape = tuple[int, ...]  # 0 is an unknown dimension
MaybeShape = Shape | None
Shapes = list[MaybeShape]
Attrs = Mapping[str, Any]

_ITEMSIZE = {"float16": 2, "bfloat16": 2, "float64": 8, "int64": 8, "uint8": 1, "int8": 1}  # others: 4


def itemsize(dtype: str) -> int:
    """Return the bytes per element."""
    return _ITEMSIZE.get(dtype, 4)


@dataclass(frozen=True, slots=True)
class Call:
    """A node with all that is inferred for it. A scalar, whose shape MXNet cannot express, has the shape (1,)."""

    attrs: Attrs
    inputs: list[Shape]
    output: Shape  # the first one
    input_dtypes: list[str]
    dtype: str  # of the outputs
    needs_grad: list[bool]  # per input: the backward pass computes its gradient
    producers: list[str]  # per input: the operator that makes it

    def input_bytes(self, index: int) -> int:
        return math.prod(self.inputs[index]) * itemsize(self.input_dtypes[index])


class Input(NamedTuple):
    """An input that is saved for the backward pass."""

    position: int


class Output(NamedTuple):
    """An output that is saved for the backward pass."""

    position: int


class Extra(NamedTuple):
    """A tensor that the forward pass makes for the backward pass alone."""

    name: str
    num_bytes: int


Saved = Input | Output | Extra


def _promote(attrs: Attrs, dtypes: Sequence[str]) -> str:
    """Return the dtype that all inputs share, else float32 (also for float16 and bfloat16 together)."""
    return dtypes[0] if len(set(dtypes)) == 1 else "float32"


def _save_nothing(call: Call) -> Iterable[Saved]:
    return ()


@dataclass(frozen=True, slots=True)
class Op:
    """An operator of the vocabulary. Inputs, attributes and defaults are those of MXNet 1.9.

    shapes: (attributes, input shapes, output shapes) -> (input shapes, output shapes), each None or with zeros where
        it is unknown. Returns what can be said of them: a convolution's weight follows from its data, a label from the
        logits. Raises ValueError for shapes that do not fit. `symbol.shape` merges the answers until nothing changes.
    parameters: inputs that become variables where none is given; auxiliary: the last of them, which the forward pass
        updates.
    visible: the number of outputs that list_outputs shows, by attributes; BatchNorm hides its statistics.
    variadic: takes `num_args` inputs arg0, arg1, ...
    dtype: (attributes, input dtypes) -> dtype of the outputs.
    saves: the tensors that autograd saves for the backward pass, given that the node has a gradient.
    is_view: whether the output shares the storage of the first input.
    recompute: whether the backward pass may compute it a second time. A loss may not: its forward pass makes the
        gradient.
    in_loss: whether a report counts it with the losses: a detector's graph has it there only.
    multiply_adds: (input shapes, output shape) -> multiplications, each with an addition.
    """

    name: str
    inputs: tuple[str, ...] = ("data",)
    attrs: Mapping[str, Attr] = field(default_factory=lambda: MappingProxyType({}))
    _: KW_ONLY
    shapes: Callable[[Attrs, Shapes, Shapes], tuple[Shapes, Shapes]]
    aliases: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    auxiliary: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ("output",)
    visible: Callable[[Attrs], int] | None = None
    variadic: bool = False
    dtype: Callable[[Attrs, Sequence[str]], str] = _promote
    saves: Callable[[Call], Iterable[Saved]] = _save_nothing
    is_view: Callable[[Call], bool] = lambda call: False
    recompute: bool = True
    in_loss: bool = False
    multiply_adds: Callable[[Sequence[Shape], Shape], int] = lambda inputs, output: 0

    def input_names(self, attrs: Attrs) -> list[str]:
        """Return the inputs that a node with these (full) attributes has, in order."""
        if self.variadic:
            return [f"arg{index}" for index in range(attrs["num_args"])]
        return [name for name in self.inputs if not attrs.get(f"no_{name}", False)]

    def num_visible(self, attrs: Attrs) -> int:
        """Return the number of outputs that list_outputs shows."""
        return self.visible(attrs) if self.visible else len(self.outputs)

    def defaults(self) -> dict[str, Any]:
        """Return the default of every attribute that has one."""
        return {key: attr.default for key, attr in self.attrs.items() if attr.default is not REQUIRED}

    def parse(self, given: Mapping[str, Any], node: str) -> dict[str, Any]:
        """Return the typed attributes of a node.

        Raises ValueError naming the node, the attribute and what was expected.
        """
        typed = {}
        for key, value in given.items():
            if key not in self.attrs:
                known = nearest(key, self.attrs) or "none"
                raise ValueError(f"{self.name} '{node}': no attribute '{key}'; nearest: {known}")
            try:
                typed[key] = self.attrs[key].parse(value)
            except ValueError as error:
                raise ValueError(f"{self.name} '{node}': attribute '{key}': {error}") from None
        for key, attr in self.attrs.items():
            if attr.default is REQUIRED and key not in typed:
                raise ValueError(f"{self.name} '{node}': attribute '{key}' is missing; expected {attr.expected()}")
        if self.variadic and not 1 <= typed.get("num_args", 1) <= 1024:
            raise ValueError(f"{self.name} '{node}': num_args: expected 1 to 1024, got {typed['num_args']}")
        return typed
