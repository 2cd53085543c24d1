"""The torch back end: a graph as a torch.fx.GraphModule, by one function per operator. Only it imports torch.

It never rewrites a graph (`symbol.passes` does) and never decides what to recompute (`symbol.memory` does).
"""

from symbol.torch_backend import batch_norm, detection, elementwise, inference, layout, loss, nn
from symbol.torch_backend.inference import lower_for_inference
from symbol.torch_backend.lowering import lower

__all__ = [
    "batch_norm",
    "detection",
    "elementwise",
    "inference",
    "layout",
    "loss",
    "lower",
    "lower_for_inference",
    "nn",
]
