"""The torch back end: a graph as a torch.fx.GraphModule, by one function per operator. Only it imports torch.

It never rewrites a graph (`symbol.passes` does) and never decides what to recompute (`symbol.memory` does).
"""

from symbol.torch_backend import detection, elementwise, layout, loss, nn, sync_batch_norm
from symbol.torch_backend.lowering import lower

__all__ = ["detection", "elementwise", "layout", "loss", "lower", "nn", "sync_batch_norm"]
