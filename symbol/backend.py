"""Back ends: one function per operator, and beside it the attributes that it refuses.

`symbol.torch_backend` is one. Another is a `Backend` of its own, its functions decorated with `lowers`, and a walk over
the nodes that calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from symbol.node import Node
from symbol.ops import OPS
from symbol.ops.row import Attrs

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Lowering:
    """The function of an operator, with the attributes that it refuses and, in words, those that it takes.

    constant: a function of the attributes whose result is the last argument of `function` and never changes.
    """

    function: Callable[..., Any]
    refuses: Callable[[Attrs], Any] | None
    only: str
    constant: Callable[..., Any] | None


class Backend:
    """The operators that a back end lowers, by name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lowerings: dict[str, Lowering] = {}

    def lowers(
        self,
        op: str,
        *,
        refuses: Callable[[Attrs], Any] | None = None,
        only: str = "",
        constant: Callable[..., Any] | None = None,
    ) -> Callable[[Function], Function]:
        """Register the decorated function for an operator; for the arguments see `Lowering`."""
        assert op in OPS, f"{op} has no row"
        assert op not in self.lowerings, f"{op} has a function in {self.name}"

        def register(function: Function) -> Function:
            self.lowerings[op] = Lowering(function, refuses, only, constant)
            return function

        return register

    def problems(self, nodes: Iterable[Node]) -> list[str]:
        """Return one line per node that cannot be lowered."""
        found = []
        for node in nodes:
            if node.is_variable:
                continue
            lowering = self.lowerings.get(node.op)
            if lowering is None:
                found.append(f"{node.op} '{node.name}': {self.name} has no function for this operator")
            elif lowering.refuses is not None and lowering.refuses(node.full_attrs()):
                found.append(f"{node.op} '{node.name}': only {lowering.only}")
        return found
