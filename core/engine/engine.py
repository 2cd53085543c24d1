"""The engine torch: one process per device, the graph lowered to a torch module."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core.distributed.launch import torchrun
from core.distributed.process_group import ProcessGroup, launched_size
from core.engine.device import available_gpus, require_gpus, select_device
from core.engine.out_of_memory import explain_out_of_memory
from core.engine.precision import configure_arithmetic, precision
from core.engine.trainer import Trainer, build_trainer
from core.weights.checkpoint import Checkpoint
from core.weights.fit import require_fit
from symbol import Symbol
from symbol.passes import in_precision
from symbol.torch_backend import lower_for_inference

if TYPE_CHECKING:
    from config.schema import Config


class TorchEngine:
    """Implements core.protocol.Engine."""

    def num_process(self, config: Config, is_train: bool) -> int:
        kvstore = config.KvstoreParam
        if is_train:
            return kvstore.num_device
        # a machine with fewer GPUs than the config names may test too
        return len(available_gpus(kvstore.gpus)) if kvstore.gpus else kvstore.processes

    def require_processes(self, config: Config) -> None:
        kvstore, launched = config.KvstoreParam, launched_size() or 1
        if launched == kvstore.num_device:
            return
        if kvstore.machines > 1 and launched == 1:
            raise ValueError(
                f"KvstoreParam.machines is {kvstore.machines}: start detection_train.py on every machine with "
                + torchrun(kvstore.machines, kvstore.devices_per_machine)
            )
        raise ValueError(
            f"the launcher started {launched} processes, and the config is for {kvstore.num_device} devices "
            "(KvstoreParam.gpus, processes, machines): start one per device, or change the config with --gpus or --set"
        )

    def select_device(self, config: Config, is_train: bool) -> torch.device:
        gpus = config.KvstoreParam.gpus
        if is_train:
            require_gpus(config)
        chosen = gpus if is_train else available_gpus(gpus) or gpus
        return select_device(chosen, int(os.environ.get("LOCAL_RANK", "0")))

    @contextmanager
    def build(
        self, config: Config, device: torch.device, iter_per_epoch: int, start: Checkpoint | None, group: ProcessGroup
    ) -> Iterator[tuple[Trainer, list[str]]]:
        with explain_out_of_memory(config, device, "the start"):
            built = build_trainer(config, device, iter_per_epoch, start, group)
        yield built

    def build_detector(
        self, config: Config, weights: Mapping[str, Tensor], device: torch.device, source: str | Path
    ) -> tuple[Callable[..., Sequence[Tensor]], list[str]]:
        compute_dtype, _ = precision(config.General, device)
        graph = in_precision(config.ModelParam.test_symbol, compute_dtype)
        require_fit(_shapes(graph, config), weights, source)
        configure_arithmetic(config.General, compute_dtype, device)
        return lower_for_inference(graph, weights, device), []


def _shapes(graph: Symbol, config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a test graph's parameters and auxiliary states, without making any."""
    arguments, _, states = graph.infer_shape(data=(1, 3, config.ResizeParam.short, config.ResizeParam.long))
    names, inputs = [*graph.list_arguments(), *graph.list_auxiliary_states()], set(graph.list_inputs())
    return {name: shape for name, shape in zip(names, [*arguments, *states], strict=True) if name not in inputs}
