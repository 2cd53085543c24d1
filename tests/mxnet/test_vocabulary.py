"""Every operator that we lower, against MXNet's on random inputs and attributes, with its JSON in both directions.

N images, C channels or classes, A anchors per cell, H, W, K anchors of all levels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mxnet", reason="MXNet 1.9.1 is not in this environment: make mxnet-test runs these")

import symbol as S
from core.engine_mxnet.graph import load_symbol
from operator_cxx.mxnet_ops import load_mxnet
from symbol import Symbol, var
from symbol.ops import OPS
from symbol.torch_backend.registry import TORCH

Random = np.random.RandomState
Inputs = dict[str, np.ndarray]


def normal(r: Random, *shape: int) -> np.ndarray:
    return r.standard_normal(shape).astype(np.float32)


def sides(r: Random) -> tuple[int, int]:
    return int(r.randint(6, 12)), int(r.randint(6, 12))


def pair(r: Random, low: int, high: int) -> tuple[int, int]:
    return int(r.randint(low, high)), int(r.randint(low, high))


def convolution(r: Random) -> tuple[Symbol, Inputs]:
    group = int(r.randint(1, 3))
    channels, filters = 2 * group, 3 * group
    kernel = pair(r, 1, 4)
    attrs = {"kernel": kernel, "stride": pair(r, 1, 3), "pad": pair(r, 0, 3), "dilate": pair(r, 1, 3)}
    out = S.Convolution(
        var("data"), num_filter=filters, num_group=group, no_bias=bool(r.randint(2)), name="op", **attrs
    )
    inputs = {"data": normal(r, 2, channels, *sides(r)), "op_weight": normal(r, filters, 2, *kernel)}
    return out, inputs | {"op_bias": normal(r, filters)}


def batch_norm(op: str) -> Callable[[Random], tuple[Symbol, Inputs]]:
    def make(r: Random) -> tuple[Symbol, Inputs]:
        attrs: dict[str, Any] = {"eps": 1e-3, "momentum": 0.8, "fix_gamma": bool(r.randint(2))}
        attrs |= {"key": f"bn{r.randint(10**9)}"} if "Sync" in op else {"use_global_stats": bool(r.randint(2))}
        inputs = {"data": 2 * normal(r, 3, 4, *sides(r)) + 1, "op_gamma": normal(r, 4), "op_beta": normal(r, 4)}
        inputs |= {"op_moving_mean": normal(r, 4), "op_moving_var": normal(r, 4) ** 2 + np.float32(0.5)}
        return S.create(op, var("data"), name="op", **attrs), inputs

    return make


def activation(r: Random) -> tuple[Symbol, Inputs]:
    kind = str(r.choice(["relu", "sigmoid", "tanh", "softrelu", "softsign"]))
    return S.Activation(var("data"), act_type=kind, name="op"), {"data": normal(r, 2, 3, *sides(r))}


def pooling(r: Random) -> tuple[Symbol, Inputs]:
    kernel = pair(r, 2, 4)
    attrs = {
        "kernel": kernel,
        "stride": pair(r, 1, 3),
        "pad": (int(r.randint(kernel[0] // 2 + 1)), int(r.randint(kernel[1] // 2 + 1))),
        "pool_type": str(r.choice(["max", "avg"])),
        "pooling_convention": str(r.choice(["valid", "full"])),
        "global_pool": bool(r.randint(4) == 0),
    }
    height, width = sides(r)
    if attrs["pooling_convention"] == "full":  # windows that start beyond the data are undefined
        height += -(height + 2 * attrs["pad"][0] - kernel[0]) % attrs["stride"][0]
        width += -(width + 2 * attrs["pad"][1] - kernel[1]) % attrs["stride"][1]
    return S.Pooling(var("data"), name="op", **attrs), {"data": normal(r, 2, 3, height, width)}


def up_sampling(r: Random) -> tuple[Symbol, Inputs]:
    scale = int(r.randint(1, 4))
    return S.UpSampling(var("data"), scale=scale, sample_type="nearest", name="op"), {
        "data": normal(r, 2, 3, *sides(r))
    }


def slice_like(r: Random) -> tuple[Symbol, Inputs]:
    axes = [(), (2, 3), (0, -1), (1,)][r.randint(4)]
    inputs = {"data": normal(r, 4, 5, 6, 7), "like": normal(r, *(r.randint(1, size + 1) for size in (4, 5, 6, 7)))}
    return S.slice_like(var("data"), var("like"), axes=axes, name="op"), inputs


def slice_axis(r: Random) -> tuple[Symbol, Inputs]:
    begin, end = [(0, None), (1, 3), (-3, -1), (2, None)][r.randint(4)]
    return S.slice_axis(var("data"), axis=int(r.randint(-3, 3)), begin=begin, end=end, name="op"), {
        "data": normal(r, 4, 5, 6)
    }


def variadic(op: str) -> Callable[[Random], tuple[Symbol, Inputs]]:
    def make(r: Random) -> tuple[Symbol, Inputs]:
        names = [f"x{index}" for index in range(r.randint(1, 5))]
        dim = int(r.randint(3))
        shapes = [[2, 3, 4] for _ in names]
        for shape in shapes if op == "Concat" else []:
            shape[dim] = r.randint(1, 5)
        attrs = {"dim": dim} if op == "Concat" else {}
        out = S.create(op, *map(var, names), name="op", **attrs)
        return out, {name: normal(r, *shape) for name, shape in zip(names, shapes, strict=True)}

    return make


def elementwise(op: str, broadcast: bool = False) -> Callable[[Random], tuple[Symbol, Inputs]]:
    def make(r: Random) -> tuple[Symbol, Inputs]:
        shapes = [[2, 3, 4], [2, 3, 4]]
        for axis in range(3 if broadcast else 0):
            shapes[r.randint(2)][axis] = int(r.choice([1, shapes[0][axis]]))
        if broadcast:  # also of unequal ranks
            cut = int(r.randint(2))
            shapes[cut] = shapes[cut][int(r.randint(3)) :]
        lhs, rhs = normal(r, *shapes[0]), normal(r, *shapes[1])
        rhs = rhs + np.sign(rhs)  # no division by nearly zero
        return S.create(op, var("lhs"), var("rhs"), name="op"), {"lhs": lhs, "rhs": rhs}

    return make


def unary(op: str, **choices: Any) -> Callable[[Random], tuple[Symbol, Inputs]]:
    def make(r: Random) -> tuple[Symbol, Inputs]:
        attrs = {key: values[r.randint(len(values))] for key, values in choices.items()}
        return S.create(op, var("data"), name="op", **attrs), {"data": normal(r, 2, 6, 4)}

    return make


RESHAPES = [
    (0, -1),
    (-1,),
    (0, 0, -1),
    (-3, 0),
    (0, -3),
    (-2,),
    (0, -4, 2, -1, 0),
    (-4, 1, 2, -2),
    (4, 12),
    (0, 2, -1, 4),
]
PERMUTATIONS = [(), (0, 2, 1), (2, 0, 1)]
NORMALIZATION = ["null", "batch", "valid"]


def labels(r: Random, *shape: int, classes: int) -> np.ndarray:
    return r.randint(-1, classes + 1, shape).astype(np.float32)


def focal_loss(r: Random) -> tuple[Symbol, Inputs]:
    attrs = {"alpha": float(r.uniform(0.1, 0.9)), "gamma": float(r.choice([0, 1.5, 2, 3])), "grad_scale": 0.5}
    attrs["normalization"] = NORMALIZATION[r.randint(3)]
    out = S._contrib_FocalLoss(var("data"), var("label"), name="op", **attrs)
    return out, {"data": 3 * normal(r, 2, 7, 3), "label": labels(r, 2, 7, classes=3)}


def bbox_norm(r: Random) -> tuple[Symbol, Inputs]:
    out = S._contrib_BBoxNorm(var("data"), var("label"), normalization=NORMALIZATION[r.randint(3)], name="op")
    return out, {"data": normal(r, 2, 8, 5), "label": labels(r, 2, 10, classes=3)}


def gen_anchor(r: Random) -> tuple[Symbol, Inputs]:
    attrs = {"scales": tuple(r.uniform(1, 9, r.randint(1, 4))), "ratios": tuple(r.uniform(0.3, 3, r.randint(1, 4)))}
    out = S._contrib_GenAnchor(var("data"), feature_stride=int(2 ** r.randint(3, 8)), name="op", **attrs)
    return out, {"data": normal(r, 2, 6, *sides(r))}


def gen_proposal(r: Random) -> tuple[Symbol, Inputs]:
    A, C, (H, W), stride = int(r.randint(1, 4)), int(r.randint(1, 4)), sides(r), 16
    corner = r.uniform(-30, 150, (H * W * A, 2))
    inputs = {
        "prob": r.permutation(2 * A * C * H * W).reshape(2, A * C, H, W) / (2 * A * C * H * W),  # distinct scores
        "delta": 0.5 * r.standard_normal((2, 4 * A, H, W)),
        "im_info": np.array([[16 * H, 16 * W - 5, 1], [16 * H - 9, 16 * W, 2]]),
        "anchors": np.concatenate([corner, corner + r.uniform(5, 90, (H * W * A, 2))], 1),
    }
    attrs = {"num_anchors": A, "rpn_pre_nms_top_n": int(r.randint(1, 60)), "thresh": float(r.choice([0, 0.5, 0.9]))}
    out = S._contrib_GenProposalRetina(*map(var, inputs), feature_stride=stride, name="op", **attrs)
    return out, {name: value.astype(np.float32) for name, value in inputs.items()}


CASES: Mapping[str, Callable[[Random], tuple[Symbol, Inputs]]] = {
    "Convolution": convolution,
    "BatchNorm": batch_norm("BatchNorm"),
    "_contrib_SyncBatchNorm": batch_norm("_contrib_SyncBatchNorm"),
    "Activation": activation,
    "Pooling": pooling,
    "UpSampling": up_sampling,
    "slice_like": slice_like,
    "slice_axis": slice_axis,
    "add_n": variadic("add_n"),
    "Concat": variadic("Concat"),
    "elemwise_add": elementwise("elemwise_add"),
    "elemwise_sub": elementwise("elemwise_sub"),
    "elemwise_mul": elementwise("elemwise_mul"),
    "broadcast_mul": elementwise("broadcast_mul", broadcast=True),
    "broadcast_div": elementwise("broadcast_div", broadcast=True),
    "_mul_scalar": unary("_mul_scalar", scalar=[-1.5, 0.25]),
    "Reshape": unary("Reshape", shape=RESHAPES),
    "transpose": unary("transpose", axes=PERMUTATIONS),
    "Cast": unary("Cast", dtype=["float32", "float64"]),
    "smooth_l1": unary("smooth_l1", scalar=[0.5, 1.0, 3.0]),
    "MakeLoss": unary("MakeLoss", grad_scale=[1.0, 0.5], normalization=NORMALIZATION),
    "_contrib_FocalLoss": focal_loss,
    "_contrib_BBoxNorm": bbox_norm,
    "_contrib_GenAnchor": gen_anchor,
    "_contrib_GenProposalRetina": gen_proposal,
}
LOSSES = ("MakeLoss", "_contrib_FocalLoss")  # their values are sums here, and they ignore the head gradient
NOT_DIFFERENTIATED = ("_contrib_GenAnchor", "_contrib_GenProposalRetina")


@pytest.mark.parametrize("op", ["broadcast_mul", "broadcast_div"])
def test_broadcasting_infers_the_shapes_that_mxnet_infers(op: str) -> None:
    """The shapes fit or do not, and have equal or unequal ranks."""
    graph = S.create(op, var("lhs"), var("rhs"), name="op")
    theirs = load_symbol(graph)
    seen = set()
    r = Random(7)
    for _ in range(200):
        lhs, rhs = (tuple(int(n) for n in r.choice([1, 2, 3], r.randint(1, 5))) for _ in range(2))
        try:
            ours: Any = graph.infer_shape(lhs=lhs, rhs=rhs)[1]
        except ValueError:
            ours = None
        try:
            expected: Any = theirs.infer_shape(lhs=lhs, rhs=rhs)[1]
        except load_mxnet().base.MXNetError:
            expected = None
        assert ours == expected, (lhs, rhs)
        seen.add((expected is None, len(lhs) == len(rhs)))
    assert len(seen) == 4
    assert graph.infer_shape(lhs=(2, 3, 4), rhs=(1,)) == ([(2, 3, 4), (1,)], [(2, 3, 4)], [])


@pytest.mark.parametrize("op", ["elemwise_add", "elemwise_sub", "elemwise_mul", "add_n"])
def test_elementwise_operators_refuse_what_mxnet_refuses(op: str) -> None:
    graph = S.create(op, var("lhs"), var("rhs"), name="op")
    with pytest.raises(load_mxnet().base.MXNetError):
        load_symbol(graph).infer_shape(lhs=(2, 3), rhs=(3,))
    with pytest.raises(ValueError, match="contradict"):
        graph.infer_shape(lhs=(2, 3), rhs=(3,))


def test_every_operator_is_tried() -> None:
    ours = {"_foreground_mean", "_focal_loss_levels", "_smooth_l1_levels"}  # of passes, unknown to MXNet
    ours |= {"_batch_norm", "_cast_weight", "_convolution_relu", "_convolution_add", "_add_relu"}
    assert CASES.keys() == OPS.keys() - ours == TORCH.lowerings.keys() - ours


def run_mxnet(graph: Any, inputs: Inputs, heads: list[np.ndarray], training: bool) -> tuple[list[Any], Inputs, Inputs]:
    """Return outputs, gradients and statistics."""
    mx = load_mxnet()
    arrays = {name: mx.nd.array(value, dtype=value.dtype) for name, value in inputs.items()}
    auxiliary = {name: arrays.pop(name) for name in graph.list_auxiliary_states()}
    arguments = {name: arrays[name] for name in graph.list_arguments()}
    gradients = {name: mx.nd.zeros(value.shape, dtype=value.dtype) for name, value in arguments.items()}
    executor = graph.bind(
        mx.cpu(), arguments, gradients if training else None, "write" if training else "null", auxiliary
    )
    outputs = [output.asnumpy() for output in executor.forward(is_train=training)]
    if training:
        executor.backward([mx.nd.array(head, dtype=head.dtype) for head in heads])
        mx.nd.waitall()
    return (
        outputs,
        {name: value.asnumpy() for name, value in gradients.items()},
        {name: value.asnumpy() for name, value in auxiliary.items()},
    )


def run_torch(
    graph: Symbol, inputs: Inputs, heads: list[np.ndarray] | None, training: bool
) -> tuple[list[Any], Inputs, Inputs]:
    shapes = {name: inputs[name].shape for name in graph.list_inputs()}
    module = S.lower(graph, **shapes).train(training)
    module.load_state_dict({name: torch.from_numpy(inputs[name]) for name in module.state_dict()})
    fed = {name: torch.from_numpy(inputs[name]).requires_grad_(training) for name in shapes}
    outputs = module(**fed)
    gradients = {}
    if training and any(output.requires_grad for output in outputs):
        assert heads is not None
        total = torch.stack([(out * torch.from_numpy(h)).sum() for out, h in zip(outputs, heads, strict=True)]).sum()
        total.backward()
        named = [*fed.items(), *module.named_parameters()]
        gradients = {name: p.grad.numpy() for name, p in named if p.grad is not None}
    return (
        [output.detach().numpy() for output in outputs],
        gradients,
        {name: module.get_buffer(name).numpy() for name in graph.list_auxiliary_states()},
    )


def assert_alike(ours: np.ndarray, theirs: np.ndarray, what: str) -> None:
    assert ours.shape == theirs.shape, what
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * max(1, np.abs(theirs).max()), err_msg=what)


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("seed", range(8))
def test_operator(op: str, seed: int) -> None:
    r = Random(1000 * seed + len(op))
    graph, inputs = CASES[op](r)
    inputs = {name: inputs[name] for name in graph.list_arguments() + graph.list_auxiliary_states()}
    theirs = load_symbol(graph)
    shapes = graph.infer_shape(**{name: inputs[name].shape for name in graph.list_inputs()})
    their_shapes = theirs.infer_shape(**{name: inputs[name].shape for name in graph.list_inputs()})
    assert [list(map(tuple, part)) for part in their_shapes] == [list(part) for part in shapes]
    back = S.load_json(theirs.tojson())
    assert json.loads(back.tojson()) == json.loads(graph.tojson())  # MXNet orders attributes differently
    dtype = np.float64 if op == "Cast" and graph.entries[0][0].attrs["dtype"] == "float64" else np.float32
    heads = [normal(r, *shape).astype(dtype) for shape in shapes[1]]
    for training in (False, True):
        outputs, gradients, statistics = run_mxnet(theirs, inputs, heads, training)
        ones = [np.ones((), dtype) for _ in outputs] if op in LOSSES else heads
        own_outputs, own_gradients, own_statistics = run_torch(back, inputs, ones, training)
        if op == "MakeLoss":  # MXNet scales its gradient, not its value
            outputs = own_outputs
        if op in LOSSES:
            outputs = [output.sum() for output in outputs]
        for ours, output in zip(own_outputs, outputs, strict=True):
            assert_alike(ours, output, "output")
        for name in own_gradients if op not in NOT_DIFFERENTIATED else ():
            assert_alike(own_gradients[name], gradients[name], f"gradient of {name}")
        assert not training or op in NOT_DIFFERENTIATED or own_gradients
        assert own_statistics.keys() == statistics.keys()
        for name, value in own_statistics.items():
            assert_alike(value, statistics[name], name)
