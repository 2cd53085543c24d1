"""Every operator of a train graph alone, on the device in each precision, against the CPU in float64.

Both sides get the same numbers: what the operators before gave in float64, rounded to the type that they have in this
precision. So an error is the operator's own, and the bounds are a few units of its type's rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

import symbol as S
from core.engine.device import move_module
from core.engine.trainer import transform_batches
from models.record import select
from symbol.passes import in_precision
from symbol.torch_backend import elementwise, nn
from symbol.torch_backend.batch_norm import move_statistics
from utils.acceptance.context import Context, set_tf32
from utils.acceptance.networks import NARROW, NASFPN_640, config_of, scene_batch

# of the norm of an operator's output, or of a gradient by it
BOUNDS = {"float64": 1e-12, "float32": 5e-5, "TF32": 4e-3, "float16": 4e-3, "bfloat16": 3e-2}


def run(context: Context) -> None:
    """One row for each operator and precision, and a check for each precision."""
    cpu = torch.device("cpu")
    config = config_of(NASFPN_640, cpu, "float16", *NARROW, "NeckParam.num_stage=1")
    batch = scene_batch(config)
    transform_batches(config, [batch])
    given = select(batch, config.data_name + config.label_name)
    inputs = {name: value.double() for name, value in given.items()}
    for precision, bound in BOUNDS.items():
        if context.small and precision not in ("float64", "bfloat16"):
            context.skip(f"operators in {precision}", "in small two precisions hold the comparison together")
            continue
        context.attempt(
            f"operators in {precision}",
            partial(_compare_all, context, config.ModelParam.train_symbol, inputs, precision, bound),
        )
    set_tf32(False)


def _compare_all(context: Context, graph: S.Symbol, inputs: dict[str, Tensor], precision: str, bound: float) -> None:
    set_tf32(precision == "TF32")
    compute_dtype: Any = precision if precision in ("float16", "bfloat16") else "float32"
    module = S.lower(in_precision(graph, compute_dtype), seed=0)
    wide = torch.float64 if precision == "float64" else torch.float32
    move_module(module, context.device).train().to(wide)
    walk = _Walk(module, context.device, wide)
    walk.run(*_in_order(module, inputs))
    for operator, (forward, gradient, at) in sorted(walk.worst.items()):
        row = {"precision": precision, "operator": operator, "outputs": forward, "gradients": gradient, "worst at": at}
        context.record("operators one by one", **row)
    worst = max(max(forward, gradient) for forward, gradient, _ in walk.worst.values())
    context.check(f"operators in {precision} agree", worst <= bound, worst=worst, bound=bound)


def _in_order(module: fx.GraphModule, inputs: dict[str, Tensor]) -> list[Tensor]:
    return [inputs[str(node.target)] for node in module.graph.nodes if node.op == "placeholder"]


class _Walk(fx.Interpreter):
    """Run a lowered graph node by node, on the device and in float64 on the CPU.

    A value on its way is float64 on the CPU; beside it is the type that it has on the device.
    """

    def __init__(self, module: fx.GraphModule, device: torch.device, wide: torch.dtype) -> None:
        super().__init__(module)
        self._device, self._wide = device, wide
        self._types: dict[fx.Node, torch.dtype] = {}
        self._types_of_many: dict[Any, list[torch.dtype]] = {}  # of nodes with several outputs
        self.worst: dict[str, tuple[float, float, str]] = {}  # by operator: outputs, gradients, and where

    def run_node(self, n: fx.Node) -> Any:
        if n.target is move_statistics:
            return None  # no output depends on the moving statistics
        if n.target is getitem:
            parent, index = n.args
            self._types[n] = self._types_of_many[parent][index]  # type: ignore[index]
            return super().run_node(n)
        if n.op == "call_function":
            return self._call(n)
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self._types[n] = self._wide
            value = value.detach().to("cpu", self._wide).double()
        return value

    def _call(self, n: fx.Node) -> Tensor | tuple[Tensor, ...]:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        sources = n.args  # positions of args; the graph has no nested ones
        pairs = list(zip(args, sources, strict=True))
        trained = [isinstance(value, Tensor) and _is_trained(source) for value, source in pairs]
        there = [self._on_device(value, source) for value, source in pairs]
        here = [value.clone() if isinstance(value, Tensor) else value for value in args]
        assert callable(n.target)
        out, leaves = _call(n.target, there, kwargs, trained)
        is_cast = n.target in (elementwise.cast, nn.cast_weight)
        wanted, wanted_leaves = _call(_identity if is_cast else n.target, here, kwargs, trained)
        if not is_cast:  # the first output: others are statistics of the data
            self._compare(n, out[0], leaves, wanted[0], wanted_leaves)
        self._types[n], self._types_of_many[n] = out[0].dtype, [one.dtype for one in out]
        results = tuple(w.detach().to(one.dtype).double() for w, one in zip(wanted, out, strict=True))
        return results if len(results) > 1 else results[0]

    def _on_device(self, value: Any, source: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        layout = torch.channels_last if value.ndim == 4 else torch.contiguous_format
        return value.to(self._device, self._types[source], copy=True).contiguous(memory_format=layout)

    def _compare(
        self, n: fx.Node, out: Tensor, leaves: list[Tensor], wanted: Tensor, wanted_leaves: list[Tensor]
    ) -> None:
        forward, gradient = relative(out, wanted), 0.0
        if leaves and out.requires_grad:
            draw = torch.Generator().manual_seed(0)
            above = torch.randn(wanted.shape, generator=draw, dtype=torch.float64) if wanted.ndim else torch.ones(())
            # where rounding decides on which side of a ReLU a sum lies, its gradient is either's
            same_side = (out.detach().cpu() == 0) == (wanted.detach() == 0)
            above = above.to(out.dtype).double() * same_side
            found = torch.autograd.grad(out, leaves, above.to(out.device, out.dtype), allow_unused=True)
            expected = torch.autograd.grad(wanted, wanted_leaves, above, allow_unused=True)
            pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
            gradient = max((relative(a, b) for a, b in pairs), default=0.0)
        name = getattr(n.target, "__name__", str(n.target))
        before = self.worst.get(name, (0.0, 0.0, ""))
        at = n.name if max(forward, gradient) >= max(before[:2]) else before[2]
        self.worst[name] = (max(forward, before[0]), max(gradient, before[1]), at)


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what was expected; where both are 0, 0."""
    norm = expected.detach().norm().item()
    off = (found.detach().double().cpu() - expected.detach()).norm().item()
    return off / norm if norm else off


def _identity(data: Tensor, **_: Any) -> Tensor:
    return data


def _is_trained(source: Any) -> bool:
    """Return True if gradients reach a value: labels and moving statistics have none."""
    if source.op == "get_attr":
        return not str(source.target).endswith(("moving_mean", "moving_var"))
    return not (source.op == "placeholder" and source.target != "data")


def _call(
    function: Callable[..., Any], values: list[Any], kwargs: dict[str, Any], trained: list[bool]
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """The function's outputs, and those of the values that it can be differentiated by."""
    values = [v.requires_grad_() if t and v.is_floating_point() else v for v, t in zip(values, trained, strict=True)]
    leaves = [value for value, t in zip(values, trained, strict=True) if t]
    out = function(*values, **kwargs)
    return (out,) if isinstance(out, Tensor) else tuple(out), leaves
