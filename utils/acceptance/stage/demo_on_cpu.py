"""The part of stage 9 that is started ahead: the demo on the CPU."""

from utils.acceptance.stage.demo import on_cpu as run

__all__ = ["run"]
