"""Graph to graph: pure functions that rewrite a Symbol and leave the one that they were given.

A pass never computes tensors, and keeps values, gradients and parameter names except where its docstring says so:
`fold_batch_norm` returns new weights with its graph.
"""

from symbol.passes.bbox_norm import hoist_bbox_norm
from symbol.passes.fusion import fuse_losses
from symbol.passes.inference import fuse_inference
from symbol.passes.norm_folding import fold_batch_norm
from symbol.passes.norm_fusion import fuse_batch_norm, without_gradient
from symbol.passes.pipeline import prepare
from symbol.passes.precision import in_precision
from symbol.passes.rewrite import rewrite
from symbol.passes.weight_cast import cast_weights

__all__ = [
    "cast_weights",
    "fold_batch_norm",
    "fuse_batch_norm",
    "fuse_inference",
    "fuse_losses",
    "hoist_bbox_norm",
    "in_precision",
    "prepare",
    "rewrite",
    "without_gradient",
]
