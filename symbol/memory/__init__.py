"""The activations of a training step in bytes, and the plan that recomputes some of them in the backward pass.

Everything follows from a graph and its input shapes: it never makes a tensor or asks a device.
"""

from symbol.memory.activations import Activations, count_activations
from symbol.memory.recompute import Plan, smallest, within

__all__ = ["Activations", "Plan", "count_activations", "smallest", "within"]
