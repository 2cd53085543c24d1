"""Parameters and multiply-adds of a graph by stage, for given input shapes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from symbol import Node, Symbol
from symbol.ops import Shape, find_op
from symbol.shape import propagate

# a node belongs to the stage whose pattern matches the start of its name
_STAGES = (
    ("backbone", re.compile(r"stage\d+(?=_)")),
    ("neck", re.compile(r"[SCP]\d+(?=_|$)")),
    ("head", re.compile(r"(cls|bbox)(?=_)")),
)
_KINDS = ("stem", "backbone", "neck", "head", "loss")  # the order of the table


@dataclass
class Stage:
    """A row of the table."""

    name: str
    output: Shape = ()
    num_parameter: int = 0
    multiply_add: int = 0  # of convolutions


@dataclass(frozen=True)
class NetworkTable:
    """The stages in graph order and their totals."""

    stages: list[Stage]
    num_parameter: int
    multiply_add: int

    def lines(self) -> list[str]:
        """Return the table as lines of text."""
        rows = [("stage", "output", "parameters", "multiply-adds")]
        for stage in self.stages:
            if not stage.num_parameter:  # pooling between stages, losses
                continue
            sides = " x ".join(map(str, stage.output))
            rows.append((stage.name, sides, f"{stage.num_parameter:,}", f"{stage.multiply_add:,}"))
        rows.append(("total", "", f"{self.num_parameter:,}", f"{self.multiply_add:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return [
            f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}"
            for row in rows
        ]


def stage_of(node: Node) -> tuple[str, str]:
    """The kind of stage that a node belongs to, and the stage's name, by the node's own name."""
    if find_op(node.op).in_loss:
        return "loss", "loss"
    for kind, pattern in _STAGES:
        match = pattern.match(node.name)
        if match:
            return kind, f"{kind} {match[0]}"
    return "stem", "stem"


def network_table(symbol: Symbol, **input_shapes: Shape) -> NetworkTable:
    """Count parameters and multiply-adds of a graph with these input shapes. A parameter that several layers share
    counts once, where it is first used; a multiply-add is one multiplication and one addition of a convolution.
    """
    known = propagate(symbol.nodes(), input_shapes)
    fed, auxiliary = set(symbol.list_inputs()), set(symbol.list_auxiliary_states())
    stages: dict[tuple[str, str], Stage] = {}
    counted: set[str] = set()
    for node in symbol.nodes():
        if node.is_variable:
            continue
        kind, name = stage_of(node)
        stage = stages.setdefault((kind, name), Stage(name))
        output = known.get((node, 0), ())
        # for a stage with several levels the finest is shown
        if kind in ("stem", "backbone") or math.prod(output[2:]) >= math.prod(stage.output[2:]):
            stage.output = output
        for child, _ in node.inputs:
            is_parameter = child.is_variable and child.name not in fed and child.name not in auxiliary
            if is_parameter and child.name not in counted:
                counted.add(child.name)
                stage.num_parameter += math.prod(known[child, 0])
        inputs = [known.get(entry, ()) for entry in node.inputs]
        stage.multiply_add += find_op(node.op).multiply_adds(inputs, output)
    rows = [stage for (kind, _), stage in sorted(stages.items(), key=lambda item: _KINDS.index(item[0][0]))]
    return NetworkTable(
        rows,
        num_parameter=sum(stage.num_parameter for stage in rows),
        multiply_add=sum(stage.multiply_add for stage in rows),
    )
