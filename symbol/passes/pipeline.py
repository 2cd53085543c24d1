"""The passes between a model's graph and the graph that a back end lowers."""

from __future__ import annotations

from symbol.graph import Symbol
from symbol.passes.bbox_norm import hoist_bbox_norm
from symbol.passes.fusion import fuse_losses


def prepare(symbol: Symbol) -> tuple[Symbol, Symbol]:
    """Return the graph whose shapes can be inferred, and the graph to lower, whose fused losses are scalars."""
    shaped = hoist_bbox_norm(symbol)
    return shaped, fuse_losses(shaped)
