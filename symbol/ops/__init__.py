"""The vocabulary: one row per operator, with everything that is known of it whatever computes it.

It never imports a back end and knows nothing of graphs: a row speaks of attributes, shapes and dtypes.
"""

from __future__ import annotations

from collections.abc import Mapping

from symbol.attributes import nearest
from symbol.ops import detection, elementwise, inference, layout, loss, nn
from symbol.ops.row import Op, Shape

__all__ = ["ALIASES", "OPS", "Op", "Shape", "find_op"]

_FAMILIES = (nn, elementwise, layout, loss, detection, inference)

OPS: Mapping[str, Op] = {row.name: row for family in _FAMILIES for row in family.ROWS}
ALIASES: Mapping[str, str] = {alias: row.name for row in OPS.values() for alias in row.aliases}


def find_op(name: str) -> Op:
    """Return the row of an operator, by MXNet's name or an alias of it. Raises ValueError with the nearest names."""
    row = OPS.get(ALIASES.get(name, name))
    if row is None:
        raise ValueError(f"unknown operator '{name}'; nearest: {nearest(name, OPS)}")
    return row
