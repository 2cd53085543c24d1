"""Compare recomputation with the same step without it, and the plan with the tensors that autograd saves.

N images, K anchors of all levels, P cells of all levels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

import symbol as S
from config.load import load_config
from core.distributed.gradient_average import GradientAverage
from core.distributed.process_group import ProcessGroup
from symbol import lower
from symbol.memory import Plan, count_activations, smallest, within
from symbol.passes import in_precision
from symbol.torch_backend.segment import Segment
from tests.small_config import NARROW
from tests.two_processes import run_in_processes

CONFIGS = Path(__file__).parents[3] / "config" / "NASFPN"
FPN, NASFPN = "retina_r50v1b_fpn_640_1@256", "retina_r50v1b_nasfpn_640_7@256"
SMALL = (
    *NARROW,
    "RpnParam.num_class=4",
    "BackboneParam.depth=18",
    "NeckParam.num_stage=2",
    "RpnParam.head.num_conv=2",
    "KvstoreParam.gpus=0",
)
STRIDES, A, SIDE = (8, 16, 32, 64, 128), 9, 128
FIXED = ("conv0",)


def train_graph(name: str, *overrides: str, precision: str = "float32") -> S.Symbol:
    config = load_config(CONFIGS / f"{name}_25epoch.py", is_train=True, overrides=(*SMALL, *overrides))
    return in_precision(config.ModelParam.train_symbol, precision)  # type: ignore[arg-type]


def batch(N: int, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    P = sum((SIDE // stride) ** 2 for stride in STRIDES)
    return {
        "data": torch.randn(N, 3, SIDE, SIDE, generator=random),
        "rpn_cls_label": torch.randint(-1, 4, (N, A * P), generator=random).float(),
        "rpn_reg_target": torch.randn(N, 4 * A, P, generator=random),
        "rpn_reg_weight": torch.randint(0, 2, (N, 4 * A, P), generator=random).float(),
    }


def training(graph: S.Symbol, plan: Plan | None = None) -> fx.GraphModule:
    module = lower(graph, recompute=plan.segments if plan else (), data=(1, 3, SIDE, SIDE))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith(FIXED))
    return module.train()


def counted(graph: S.Symbol, N: int = 2) -> Any:
    return count_activations(graph, {"data": (N, 3, SIDE, SIDE)}, FIXED)


def results(module: nn.Module, *batches: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return losses, gradients and moving statistics after a step per batch, with gradients accumulated."""
    found: dict[str, Tensor] = {}
    for i, one in enumerate(batches):
        losses = module(**one)
        torch.stack(losses).sum().backward()
        found |= {f"loss{j} of {i}": loss.detach() for j, loss in enumerate(losses)}
    found |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different


def saved_by_autograd(module: nn.Module, call: Callable[[], Any], *others: Tensor) -> int:
    """Return the bytes of the storages that a call saves, without scalars, the module's tensors and `others`."""
    others += tuple(module.state_dict(keep_vars=True).values())
    own = {tensor.untyped_storage().data_ptr() for tensor in others}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.ndim and tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def plans(graph: S.Symbol) -> list[Plan]:
    found = counted(graph)
    least = smallest(found)
    between = within(found, (least.peak_bytes + found.kept_bytes) / 2)
    assert between is not None
    return [least, between, smallest(found, until="stage2_unit1_relu")]


@pytest.mark.parametrize("name", [FPN, NASFPN])
def test_the_count_is_what_autograd_saves(name: str) -> None:
    graph, inputs = train_graph(name), batch(2)
    module = training(graph)
    assert counted(graph).kept_bytes == saved_by_autograd(module, lambda: module(**inputs))


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_the_count_in_half_precision(precision: str) -> None:
    graph, inputs = train_graph(NASFPN, "General.fp16=True", precision=precision), batch(2)
    module = training(graph)
    assert counted(graph).kept_bytes == saved_by_autograd(module, lambda: module(**inputs))


@pytest.mark.parametrize("name", [FPN, NASFPN])
def test_a_plan_holds_what_autograd_then_saves(name: str) -> None:
    graph, inputs = train_graph(name), batch(2)
    for plan in plans(graph):
        module = training(graph, plan)
        kept = saved_by_autograd(module, lambda module=module: module(**inputs))
        assert kept == plan.forward_bytes < plan.counted.kept_bytes


def test_the_inside_of_a_segment_is_what_its_recomputation_holds() -> None:
    graph, inputs = train_graph(NASFPN), batch(2)
    plan = smallest(counted(graph))
    module = training(graph, plan)
    found = []

    def measure(segment: nn.Module, arguments: Any) -> None:
        training, crossing, parameters = arguments
        found.append(saved_by_autograd(module, lambda: segment.body(training, *crossing, *parameters), *crossing))

    for segment in module.children():
        assert isinstance(segment, Segment)
        segment.register_forward_pre_hook(measure)
    module(**inputs)
    assert len(found) > 2
    assert found == [plan.inside_bytes(*run) for run in plan.segments]


@pytest.mark.parametrize("name", [FPN, NASFPN])
def test_a_step_has_the_same_bits(name: str) -> None:
    graph, batches = train_graph(name), [batch(2), batch(2, seed=1)]
    expected = results(training(graph), *batches)
    assert {"bn0_gamma", "bn0_moving_mean", "loss1 of 1"} < expected.keys()
    for plan in plans(graph):
        assert_same_bits(results(training(graph, plan), *batches), expected)


def test_a_step_in_half_precision_has_the_same_bits() -> None:
    graph = train_graph(FPN, "General.fp16=True", precision="bfloat16")
    plan = smallest(counted(graph))
    assert_same_bits(results(training(graph, plan), batch(2)), results(training(graph), batch(2)))


def test_without_a_plan_the_graph_is_the_same() -> None:
    graph = train_graph(FPN)
    plain, planned = training(graph), training(graph, smallest(counted(graph)))
    roomy = within(counted(graph), float("inf"))
    same = training(graph, roomy).code == plain.code  # long texts: pytest would compare them for minutes
    assert same
    calls = [sum(node.op == "call_module" for node in module.graph.nodes) for module in (plain, planned)]
    assert calls[0] == 0 < calls[1]
    assert_same_bits(planned.state_dict(), plain.state_dict())


def test_outside_training_a_segment_runs_plainly() -> None:
    graph, inputs = train_graph(NASFPN), batch(2)
    plain, planned = training(graph).eval(), training(graph, smallest(counted(graph))).eval()
    for found, expected in zip(planned(**inputs), plain(**inputs), strict=True):
        assert torch.equal(found, expected)
    kept = [saved_by_autograd(module, lambda module=module: module(**inputs)) for module in (plain, planned)]
    assert kept[0] == kept[1]
    with torch.no_grad():
        assert saved_by_autograd(planned.train(), lambda: planned(**inputs)) == 0


def test_the_backward_pass_may_run_twice_and_in_a_thread_of_its_own() -> None:
    graph, inputs = train_graph(FPN), batch(2)
    expected = results(training(graph), inputs)
    module = training(graph, smallest(counted(graph)))
    loss = torch.stack(module(**inputs)).sum()
    thread = threading.Thread(target=lambda: loss.backward(retain_graph=True))
    thread.start()
    thread.join()
    once = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    loss.backward()
    for name, gradient in once.items():
        assert torch.equal(gradient, expected[name])
        assert torch.equal(module.get_parameter(name).grad, 2 * gradient)
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, expected[name])


def test_recomputed_multiply_adds_are_those_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, inputs = train_graph(NASFPN), batch(1)
    plan = smallest(counted(graph, N=1))
    module = training(graph, plan)
    losses = module(**inputs)
    again = []
    conv2d = torch.nn.functional.conv2d

    def count(data: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
        out = conv2d(data, weight, *arguments)
        again.append(out.numel() * weight[0].numel())  # not reached where the recomputation stops
        return out

    monkeypatch.setattr(torch.nn.functional, "conv2d", count)
    torch.stack(losses).sum().backward()
    assert sum(again) == plan.recomputed_multiply_add > 0


def small_graph() -> S.Symbol:
    """data -> a (convolution) -> ra -> b -> rb -> c -> rc -> loss; every map is (N, 4, 8, 8), 1024 N bytes."""
    x = S.var("data", shape=(0, 4, 8, 8))
    for name in "abc":
        x = S.Convolution(x, kernel=(1, 1), num_filter=4, no_bias=True, name=name)
        x = S.Activation(x, act_type="sigmoid", name=f"r{name}")
    return S.MakeLoss(x, name="loss")


def test_a_plan_by_hand() -> None:
    found = count_activations(small_graph(), {"data": (1, 4, 8, 8)})
    assert found.kept_bytes == 4 * 1024  # data and three sigmoids, each also saved by the next convolution
    plan = Plan(found, ((0, 2), (2, 4)))  # data and ra stay for the segments, rb for c, rc for itself
    assert plan.forward_bytes == 4 * 1024
    plan = Plan(found, ((0, 4),))  # data, rb for c, rc
    assert plan.forward_bytes == 3 * 1024
    assert plan.inside_bytes(0, 4) == 2 * 1024  # ra and rb
    assert plan.peak_bytes == 3 * 1024  # the forward pass's; recomputing holds data, ra and rb
    assert plan.until == "rb"
    assert plan.recomputed_multiply_add == 2 * 4 * 64 * 4
    assert plan.describe() == (
        "memonger: recomputed up to rb in 1 segment: activations 0 MiB instead of 0 MiB, "
        "22.2% more multiply-adds per step"
    )
    everything = Plan(found, ((0, 6),))
    assert (everything.forward_bytes, everything.peak_bytes) == (1024, 4 * 1024)


def test_a_budget_takes_the_least_recomputation() -> None:
    found = counted(train_graph(NASFPN))
    nothing = within(found, found.kept_bytes)
    assert nothing is not None
    assert nothing.segments == ()
    assert "nothing has to be recomputed" in nothing.describe()
    least, costs = smallest(found), [0]
    for budget in (0.95, 0.9, 0.85, 0.8):
        plan = within(found, budget * found.kept_bytes)
        if plan is not None:
            assert plan.peak_bytes <= budget * found.kept_bytes
            costs.append(plan.recomputed_multiply_add)
    assert costs == sorted(costs)
    assert len(costs) > 2
    assert within(found, least.peak_bytes).peak_bytes == least.peak_bytes  # type: ignore[union-attr]
    assert within(found, least.peak_bytes - 1) is None


def test_until_ends_the_prefix() -> None:
    found = counted(train_graph(NASFPN))
    for name in ("stage1_unit1_relu1", "S1_P4_1", "cls_conv2_relu_s8"):
        plan = smallest(found, until=name)
        assert plan.until == name
        same = within(found, float("inf"), until=name)
        assert same is not None
        assert same.until == name
    for name in ("cls_loss", "reg_loss"):  # losses themselves are never recomputed
        assert smallest(found, until=name).until.startswith({"c": "cls_pred", "r": "bbox_pred"}[name[0]])


def test_a_joined_operator_stands_for_what_it_became() -> None:
    found = counted(train_graph(NASFPN))
    for name in ("stage1_unit1_bn1", "cls_conv1_bn_s8"):
        assert smallest(found, until=name).until == name.replace("bn1", "relu1").replace("bn_s8", "relu_s8")
    # the sum and the normalization before it are part of the unit's ReLU
    assert smallest(found, until="stage1_unit2_bn2").until == "stage1_unit2_relu"


def test_an_unknown_node_is_refused_with_the_nearest() -> None:
    found = counted(train_graph(FPN))
    with pytest.raises(ValueError, match="no operator of the graph is named 'stage2_unit9_relu'; nearest: stage2_unit"):
        smallest(found, until="stage2_unit9_relu")
    with pytest.raises(ValueError, match="nothing up to operator 'conv0' can be recomputed"):
        smallest(found, until="conv0")  # fixed: it saves nothing


def with_and_without(rank: int, parts: list[dict[str, Tensor]]) -> list[tuple[int, dict[str, Tensor]]]:
    """Return, for a step without and with recomputation, the number of collectives and the averaged results."""
    calls = []

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls.append(function)
            return function(*arguments, **named)

        return call

    dist.all_gather, dist.all_reduce = counting(dist.all_gather), counting(dist.all_reduce)
    graph = train_graph(NASFPN, "NormalizeParam.type=syncbn", "NeckParam.num_stage=1")
    found = []
    for plan in (None, smallest(counted(graph, N=1))):
        calls.clear()
        module = training(graph, plan)
        average = GradientAverage(module.parameters(), ProcessGroup(rank, 2), bucket_bytes=2000)
        average.start()
        step = results(module, parts[rank])
        average.finish()
        step |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        found.append((len(calls), step))
    return found


def test_recomputation_repeats_no_collective() -> None:
    for (number, expected), (number_again, found) in run_in_processes(with_and_without, [batch(1), batch(1, seed=1)]):
        assert number == number_again > 20
        assert_same_bits(found, expected)


def test_compile_and_export_see_through_a_segment() -> None:
    x = S.Convolution(S.var("data"), kernel=(3, 3), num_filter=4, no_bias=True, name="a")
    x = S.Activation(S.BatchNorm(x, name="bn", fix_gamma=False), act_type="relu", name="ra")
    graph = S.MakeLoss(S.Convolution(x, kernel=(1, 1), num_filter=2, name="b"), name="loss")
    inputs = {"data": batch(1)["data"][:, :, :16, :16]}

    def fresh() -> fx.GraphModule:
        return lower(graph, recompute=((0, 3),), data=(1, 3, 16, 16))

    expected = results(lower(graph, data=(1, 3, 16, 16)), inputs)
    compiled = fresh()
    loss = torch.compile(compiled, backend="eager", fullgraph=True)(**inputs)[0]
    loss.backward()
    exported = torch.export.export(fresh(), (), inputs).module()
    for found in (loss, exported(**inputs)[0]):
        assert torch.equal(found, expected["loss0 of 0"])
    for name, parameter in compiled.named_parameters():
        assert torch.equal(parameter.grad, expected[name])


def test_a_view_saves_the_whole_storage() -> None:
    x = S.Convolution(S.var("data"), kernel=(1, 1), num_filter=4, no_bias=True, name="a")
    x = S.slice_axis(x, axis=2, begin=0, end=3, name="part")
    graph = S.MakeLoss(S.Convolution(x, kernel=(1, 1), num_filter=2, no_bias=True, name="b"), name="loss")
    data = batch(1)["data"][:, :, :16, :16].contiguous()
    module = lower(graph, data=tuple(data.shape)).train()
    found = count_activations(graph, {"data": tuple(data.shape)}).kept_bytes
    assert found == saved_by_autograd(module, lambda: module(data=data)) == (3 + 4) * 16 * 16 * 4
