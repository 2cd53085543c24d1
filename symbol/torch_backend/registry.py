"""The functions of the torch back end, by operator."""

from symbol.backend import Backend

TORCH = Backend("torch")
lowers = TORCH.lowers
