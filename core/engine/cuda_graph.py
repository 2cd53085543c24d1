"""Forward and backward pass of a batch as CUDA graphs: recorded once per input shape, then launched as a whole.

A pass of a stacked pyramid launches thousands of short kernels, one by one slower than a GPU computes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from config.schema import Config

WARM_UP = 3  # eager passes of a shape before it is recorded: cuDNN chooses its algorithms, libraries allocate
MAX_GRAPHS = 2  # landscape and portrait batches

Compute = Callable[[Mapping[str, Tensor]], list[Tensor]]  # inputs by name to outputs; adds gradients to `.grad`


def graph_obstacle(config: Config, device: torch.device) -> str | None:
    """Return the reason why a run computes without CUDA graphs; None if it can have them."""
    if device.type != "cuda":
        return "there is no GPU"
    if config.NormalizeParam.type == "syncbn" and config.KvstoreParam.num_device > 1:
        return "with NormalizeParam.type=syncbn the processes communicate inside a pass"
    return None


class Recorder(Protocol):
    """The CUDA facilities that graphs need; tests replace them."""

    def run_aside(self, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Run an eager pass on the stream that passes are recorded on."""
        ...

    def record(self, compute: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """Record a pass without running it. Returns its outputs, which a replay fills, and the replay."""
        ...


class CudaRecorder:
    """torch.cuda's streams and graphs.

    All graphs share one memory pool: only inputs, outputs and gradients, which are referenced, outlast a replay.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def run_aside(self, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        main = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            outputs = compute()
        main.wait_stream(self._stream)
        return outputs

    def record(self, compute: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread may pin memory meanwhile, which the default mode forbids to all threads
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
            outputs = compute()
        return outputs, graph.replay


@dataclass(frozen=True)
class _Graph:
    """A recorded pass with the tensors that it reads and writes."""

    inputs: dict[str, Tensor]
    outputs: list[Tensor]
    gradients: list[Tensor | None]  # per parameter
    replay: Callable[[], None]


class GraphedPass:
    """Runs passes of full batches as CUDA graphs, others eagerly; both add to the parameters' `.grad`.

    The first WARM_UP passes of a shape are eager. A batch of another size than `num_image`, such as the last of an
    epoch, a shape beyond MAX_GRAPHS and all shapes after a recording that failed stay eager; `notes` has a line for the
    log about each graph and each failure.
    """

    def __init__(self, parameters: Iterable[Tensor], num_image: int, recorder: Recorder) -> None:
        self.notes: list[str] = []
        self._parameters = [p for p in parameters if p.requires_grad]
        self._num_image = num_image
        self._recorder = recorder
        self._graphs: dict[object, _Graph] = {}
        self._warm: Counter[object] = Counter()
        self._totals: list[Tensor] = []  # per parameter: gradients of several batches
        self._failed = False

    def __call__(self, compute: Compute, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the outputs of a pass, which hold until the next call. `compute` is the same function in all calls."""
        key = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
        if key not in self._graphs:
            is_full = all(len(value) == self._num_image for value in inputs.values())
            if self._failed or not is_full or len(self._graphs) == MAX_GRAPHS:
                return compute(inputs)
            if self._warm[key] < WARM_UP:
                self._warm[key] += 1
                return self._recorder.run_aside(partial(compute, inputs))
            recorded = self._record(compute, inputs)
            if recorded is None:
                return compute(inputs)
            self._graphs[key] = recorded
        return self._replay(self._graphs[key], inputs)

    def _record(self, compute: Compute, inputs: Mapping[str, Tensor]) -> _Graph | None:
        """Return the graph of a pass; None if it cannot be recorded. `.grad` stays as it is."""
        before = [p.grad for p in self._parameters]
        own = {name: value.clone() for name, value in inputs.items()}
        shapes = " x ".join(map(str, next(iter(own.values())).shape))
        try:
            for parameter in self._parameters:
                parameter.grad = None  # the recorded pass then writes its gradients, and does not add to others
            outputs, replay = self._recorder.record(partial(compute, own))
            self.notes.append(f"forward and backward of {shapes} are a CUDA graph from here on")
            return _Graph(own, outputs, [p.grad for p in self._parameters], replay)
        except RuntimeError as error:  # what the driver refuses, and running out of memory
            self._failed = True
            first = str(error).strip().partition("\n")[0]
            self.notes.append(f"no CUDA graph of {shapes}, such passes stay eager: {first}")
            return None
        finally:
            for parameter, gradient in zip(self._parameters, before, strict=True):
                parameter.grad = gradient

    def _replay(self, graph: _Graph, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        self._move_gradients()
        for name, value in graph.inputs.items():
            value.copy_(inputs[name])
        graph.replay()
        new = [(p, g) for p, g in zip(self._parameters, graph.gradients, strict=True) if g is not None]
        added = [(p.grad, g) for p, g in new if p.grad is not None]
        if added:
            torch._foreach_add_([total for total, _ in added], [g for _, g in added])
        for parameter, gradient in new:
            if parameter.grad is None:
                parameter.grad = gradient
        return graph.outputs

    def _move_gradients(self) -> None:
        """Move the gradients of the step's earlier batches out of the memory that a replay overwrites."""
        if all(p.grad is None for p in self._parameters):
            return
        if not self._totals:
            self._totals = [torch.empty_like(p).detach() for p in self._parameters]
        pairs = zip(self._parameters, self._totals, strict=True)
        moved = [(p, total, p.grad) for p, total in pairs if p.grad is not None and p.grad is not total]
        if moved:
            torch._foreach_copy_([total for _, total, _ in moved], [gradient for _, _, gradient in moved])
        for parameter, total, _ in moved:
            parameter.grad = total
