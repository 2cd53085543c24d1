"""The passes between a model's graph and the graph that a back end lowers."""

from __future__ import annotations

from symbol.graph import Symbol
from symbol.passes.bbox_norm import hoist_bbox_norm
from symbol.passes.fusion import fuse_losses
from symbol.passes.norm_fusion import fuse_batch_norm
from symbol.passes.weight_cast import cast_weights


def prepare(symbol: Symbol) -> tuple[Symbol, Symbol]:
    """Return the graph whose shapes can be inferred, and the graph to lower, whose fused losses are scalars."""
    shaped = cast_weights(fuse_batch_norm(hoist_bbox_norm(symbol)))
    return shaped, fuse_losses(shaped)
