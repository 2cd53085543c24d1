"""The engine MXNet 1.9.1: one process per machine, for all of its devices.

It is tested on CPUs with MXNet 1.9.1; on GPUs, with a CUDA build of MXNet, it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from core.distributed.launch import torchrun
from core.distributed.process_group import ProcessGroup, launched_size
from core.engine_mxnet.graph import contexts, load_symbol
from core.engine_mxnet.trainer import MxnetTrainer, build_trainer
from core.weights.checkpoint import Checkpoint
from core.weights.fit import require_fit
from operator_cxx.mxnet_ops import load_mxnet
from symbol.passes import in_precision

if TYPE_CHECKING:
    from config.schema import Config


class MxnetEngine:
    """Implements core.protocol.Engine."""

    def num_process(self, config: Config, is_train: bool) -> int:
        return 1

    def require_processes(self, config: Config) -> None:
        kvstore, launched = config.KvstoreParam, launched_size() or 1
        if launched == kvstore.machines:
            return
        raise ValueError(
            f"KvstoreParam.machines is {kvstore.machines}, and {launched} process(es) were started: the engine mxnet "
            "has one on each machine, for all of its devices; start detection_train.py "
            + (f"on each with {torchrun(kvstore.machines, 1)}" if kvstore.machines > 1 else "without a launcher")
        )

    def select_device(self, config: Config, is_train: bool) -> torch.device:
        if not is_train and launched_size() not in (None, 1):
            raise ValueError(
                "the engine mxnet tests in one process, on one device: start detection_test.py without a launcher, or "
                "use the engine torch"
            )
        return torch.device("cpu")  # MXNet copies batches from there

    @contextmanager
    def build(
        self, config: Config, device: torch.device, iter_per_epoch: int, start: Checkpoint | None, group: ProcessGroup
    ) -> Iterator[tuple[MxnetTrainer, list[str]]]:
        trainer, notes = build_trainer(config, iter_per_epoch, start, group)
        with trainer.kvstore:
            yield trainer, notes

    def build_detector(
        self, config: Config, weights: Mapping[str, Tensor], device: torch.device, source: str | Path
    ) -> tuple[Callable[..., Sequence[Tensor]], list[str]]:
        detector = MxnetDetector(config, weights, source)
        return detector, [detector.describe()]


class MxnetDetector:
    """A test graph on MXNet, called as the lowered module is: inputs by name, outputs as a list."""

    def __init__(self, config: Config, weights: Mapping[str, Tensor], source: str | Path) -> None:
        self._graph = in_precision(config.ModelParam.test_symbol, "float32")
        arguments, _, auxiliary = self._graph.infer_shape(
            data=(1, 3, config.ResizeParam.short, config.ResizeParam.long), im_info=(1, 3)
        )
        names = [*self._graph.list_arguments(), *self._graph.list_auxiliary_states()]
        shapes = dict(zip(names, [*arguments, *auxiliary], strict=True))
        expected = {name: shape for name, shape in shapes.items() if name not in self._graph.list_inputs()}
        require_fit(expected, weights, source)
        (self._context,) = contexts(config, most=1)
        self._weights = {name: value.float().numpy() for name, value in weights.items()}
        self._executors: dict[tuple[int, ...], Any] = {}  # by the shape of the images

    def describe(self) -> str:
        """Return the back end and device, as a line to print."""
        return f"engine: MXNet {load_mxnet().__version__} on {self._context}, in float32"

    def __call__(self, **inputs: Tensor) -> list[Tensor]:
        mx = load_mxnet()
        arrays = {name: mx.nd.array(value.numpy(), ctx=self._context) for name, value in inputs.items()}
        executor = self._executor(arrays)
        return [torch.from_numpy(output.asnumpy()) for output in executor.forward(is_train=False, **arrays)]

    def _executor(self, inputs: Mapping[str, Any]) -> Any:
        shape = inputs["data"].shape
        if shape not in self._executors:
            mx = load_mxnet()
            given = {name: mx.nd.array(value, ctx=self._context) for name, value in self._weights.items()}
            auxiliary = {name: given.pop(name) for name in self._graph.list_auxiliary_states()}
            arguments = {**given, **{name: value.copy() for name, value in inputs.items()}}
            self._executors[shape] = load_symbol(self._graph).bind(
                self._context, arguments, grad_req="null", aux_states=auxiliary
            )
        return self._executors[shape]
