"""The choice of the engine, made once per run."""

from __future__ import annotations

from core.protocol import Engine, EngineName


def choose_engine(name: EngineName) -> Engine:
    """Return the engine of this name. MXNet's is imported only on demand: MXNet is optional."""
    if name == "mxnet":
        from core.engine_mxnet.engine import MxnetEngine

        return MxnetEngine()
    from core.engine.engine import TorchEngine

    return TorchEngine()
