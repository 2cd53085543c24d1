"""Compare each operator of the ONNX back end with the torch back end, in onnxruntime. N images, C channels, H, W."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import symbol as S
from symbol import Symbol, lower, var
from symbol.onnx_backend import export
from symbol.onnx_backend.registry import ONNX
from symbol.ops import OPS

BATCHES = (1, 3)


def run_both(
    graph: Symbol, inputs: dict[str, np.ndarray], traced: int = 1
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the outputs of torch and of onnxruntime; the graph is exported for a batch of `traced` images."""
    generator = torch.Generator().manual_seed(1)
    module = lower(graph, **{name: array.shape for name, array in inputs.items()}).eval()
    weights = {name: torch.rand(t.shape, generator=generator) + 0.5 for name, t in module.state_dict().items()}
    module.load_state_dict(weights)
    with torch.inference_mode():
        expected = module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    shapes = {name: (traced, *array.shape[1:]) for name, array in inputs.items()}
    model = export(graph, {name: tensor.numpy() for name, tensor in weights.items()}, **shapes)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [tensor.numpy() for tensor in expected], session.run(None, inputs)


def check(
    op: str, *shapes: tuple[int, ...], parameters: tuple[str, ...] = (), exact: bool = False, **attrs: Any
) -> None:
    """Compare one node on random inputs of these shapes (without N), in batches of one and of three images."""
    names = [f"x{i}" for i in range(len(shapes))]
    graph = S.create(op, *map(var, names), name="node", **attrs)
    for N in BATCHES:
        rng = np.random.default_rng(N)
        inputs = {name: rng.standard_normal((N, *shape), np.float32) for name, shape in zip(names, shapes, strict=True)}
        expected, got = run_both(graph, inputs)
        assert len(expected) == len(got)
        for a, b in zip(expected, got, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            np.testing.assert_allclose(b, a, rtol=0 if exact else 2e-5, atol=0 if exact else 2e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "kernel, stride, pad, dilate, group",
    [
        ((3, 3), (), (), (), 1),
        ((3, 2), (2, 1), (1, 2), (), 1),
        ((3, 3), (1, 2), (2, 0), (2, 1), 1),
        ((1, 1), (2, 2), (0, 0), (1, 1), 2),
    ],
)
def test_convolution(kernel: Any, stride: Any, pad: Any, dilate: Any, group: int, bias: bool) -> None:
    attrs = {"kernel": kernel, "stride": stride, "pad": pad, "dilate": dilate, "num_group": group, "no_bias": not bias}
    check("Convolution", (4, 9, 8), num_filter=6, **attrs)


@pytest.mark.parametrize("op", ["BatchNorm", "_contrib_SyncBatchNorm"])
@pytest.mark.parametrize("fix_gamma", [False, True])
def test_batch_norm_that_follows_no_convolution(op: str, fix_gamma: bool) -> None:
    extra = {"key": "node"} if op.startswith("_") else {}
    check(op, (4, 5, 6), eps=1e-2, fix_gamma=fix_gamma, **extra)


def test_batch_norm_behind_a_convolution_is_folded() -> None:
    data = S.Convolution(var("data"), kernel=(3, 3), num_filter=4, name="conv")
    graph = S.Activation(S.BatchNorm(data, name="bn", fix_gamma=False), act_type="relu", name="relu")
    expected, got = run_both(graph, {"data": np.random.default_rng(0).standard_normal((2, 3, 6, 6), np.float32)})
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=1e-5)
    model = export(
        graph, {name: t.numpy() for name, t in lower(graph, data=(1, 3, 6, 6)).state_dict().items()}, data=(1, 3, 6, 6)
    )
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu", "Identity"]


@pytest.mark.parametrize("act_type", ["relu", "sigmoid", "tanh", "softrelu", "softsign"])
def test_activation(act_type: str) -> None:
    check("Activation", (4, 5, 6), act_type=act_type)


@pytest.mark.parametrize("convention", ["valid", "full"])
@pytest.mark.parametrize(
    "kernel, stride, pad",
    [((2, 2), (2, 2), (0, 0)), ((3, 3), (2, 3), (1, 1)), ((3, 3), (1, 2), (1, 0)), ((2, 2), (), ())],
)
def test_max_pooling(kernel: Any, stride: Any, pad: Any, convention: str) -> None:
    attrs = {"kernel": kernel, "stride": stride, "pad": pad, "pooling_convention": convention}
    check("Pooling", (3, 8, 10), pool_type="max", exact=True, **attrs)


@pytest.mark.parametrize("kernel, stride, pad", [((2, 2), (2, 2), (0, 0)), ((3, 3), (2, 3), (1, 1))])
def test_average_pooling(kernel: Any, stride: Any, pad: Any) -> None:
    check("Pooling", (3, 8, 10), pool_type="avg", kernel=kernel, stride=stride, pad=pad)


@pytest.mark.parametrize("pool_type", ["max", "avg"])
def test_global_pooling(pool_type: str) -> None:
    check("Pooling", (3, 8, 10), pool_type=pool_type, global_pool=True, kernel=(1, 1))


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_up_sampling(scale: int) -> None:
    check("UpSampling", (3, 4, 5), scale=scale, sample_type="nearest", exact=True)


@pytest.mark.parametrize("axes", [(), (2, 3), (3,), (-1,), (0, 1)])
def test_slice_like(axes: tuple[int, ...]) -> None:
    check("slice_like", (4, 6, 7), (4 if not axes else 3, 5, 6), axes=axes, exact=True)


@pytest.mark.parametrize("axis, begin, end", [(1, 1, 3), (-1, 0, None), (2, -3, -1), (3, 2, None)])
def test_slice_axis(axis: int, begin: int, end: int | None) -> None:
    check("slice_axis", (4, 6, 7), axis=axis, begin=begin, end=end, exact=True)


@pytest.mark.parametrize(
    "shape, reverse",
    [
        ((0, 2, 3, -1), False),
        ((0, -3, 0), False),
        ((-1, 6), False),
        ((0, 0, -1), False),
        ((-3, -2), False),
        ((0, 4, -1), True),
    ],
)
def test_reshape(shape: tuple[int, ...], reverse: bool) -> None:
    check("Reshape", (6, 4, 5), shape=shape, reverse=reverse, exact=True)


@pytest.mark.parametrize("axes", [(0, 2, 3, 1), (1, 0, 2, 3), ()])
def test_transpose(axes: tuple[int, ...]) -> None:
    check("transpose", (3, 4, 5), axes=axes, exact=True)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_concat(dim: int) -> None:
    shapes = [(3, 4, 5)] * 3 if dim == 0 else [(2, 4, 5), (3, 4, 5), (1, 4, 5)] if dim == 1 else [(3, 4, 1), (3, 4, 6)]
    check("Concat", *shapes, dim=dim, exact=True)


@pytest.mark.parametrize("op", ["elemwise_add", "elemwise_sub", "elemwise_mul", "add_n"])
def test_element_by_element(op: str) -> None:
    check(op, (3, 4, 5), (3, 4, 5), exact=True)


def test_add_n_of_one_and_of_three() -> None:
    check("add_n", (3, 4), exact=True)
    check("add_n", (3, 4), (3, 4), (3, 4), exact=True)


@pytest.mark.parametrize("op", ["broadcast_mul", "broadcast_div"])
@pytest.mark.parametrize("rhs", [(3, 4, 5), (3, 1, 1)])
def test_broadcasting(op: str, rhs: tuple[int, ...]) -> None:
    check(op, (3, 4, 5), rhs)


def test_multiply_by_a_scalar() -> None:
    check("_mul_scalar", (3, 4), scalar=1.7, exact=True)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "float64", "int64"])
def test_cast(dtype: str) -> None:
    graph = S.Cast(S._mul_scalar(var("data"), scalar=10.0, name="tens"), dtype=dtype, name="cast")
    expected, got = run_both(graph, {"data": np.random.default_rng(0).random((2, 3, 4), np.float32)})
    assert got[0].dtype == expected[0].dtype == dtype
    np.testing.assert_array_equal(got[0], expected[0])


def test_casts_of_mixed_precision_are_taken_out() -> None:
    graph = S.Cast(S.Cast(var("data"), dtype="float16", name="half"), dtype="float32", name="full")
    model = export(S.Activation(graph, act_type="relu", name="relu"), {}, data=(1, 3))
    assert [node.op_type for node in model.graph.node] == ["Relu", "Identity"]


def proposal(stride: int, top_n: int, thresh: float) -> Symbol:
    prob = var("prob")
    anchors = S._contrib_GenAnchor(prob, scales=(2.0, 3.0), ratios=(0.5, 1.0), feature_stride=stride, name="anchors")
    return S._contrib_GenProposalRetina(
        *(prob, var("delta"), var("im_info"), anchors),
        num_anchors=4,
        feature_stride=stride,
        rpn_pre_nms_top_n=top_n,
        thresh=thresh,
        name="proposal",
    )


@pytest.mark.parametrize("N", BATCHES)
@pytest.mark.parametrize("top_n, thresh", [(7, 0.0), (30, 0.5), (200, 0.9), (1000, 0.3)])
def test_candidates(N: int, top_n: int, thresh: float) -> None:
    """Scores have two decimals, so that many are equal; boxes reach beyond the image, some deltas beyond the cap.

    Only the first image is large enough for the boxes of such deltas.
    """
    rng = np.random.default_rng(N)
    inputs = {
        "prob": rng.integers(0, 100, (N, 4 * 3, 5, 6)).astype(np.float32) / 100,
        "delta": rng.standard_normal((N, 16, 5, 6), np.float32) * 2,
        "im_info": np.array([[5000, 6000, 1], [30, 20, 0.5], [40, 48, 2]], np.float32)[:N],
    }
    expected, got = run_both(proposal(8, top_n, thresh), inputs)
    assert (expected[1] > 0).any()
    np.testing.assert_array_equal(got[1], expected[1])  # the same candidates in the same order
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=1e-5)


def test_anchors() -> None:
    graph = S._contrib_GenAnchor(
        var("prob"), scales=(4.0, 5.0), ratios=(0.5, 1.0, 2.0), feature_stride=16, name="anchors"
    )
    expected, got = run_both(graph, {"prob": np.zeros((2, 6, 3, 4), np.float32)})
    assert expected[0].shape == (3 * 4 * 6, 4)
    np.testing.assert_array_equal(got[0], expected[0])


def test_every_node_without_a_function_is_listed() -> None:
    loss = S.MakeLoss(S.smooth_l1(var("data"), scalar=3.0, name="smooth"), name="loss")
    pooled = S.Pooling(var("data"), kernel=(2, 2), pool_type="sum", name="pool")
    with pytest.raises(ValueError, match="cannot be exported to ONNX") as error:
        export(S.Group([loss, pooled]), {}, data=(1, 3, 4, 4))
    for expected in (
        "smooth_l1 'smooth'",
        "MakeLoss 'loss'",
        "Pooling 'pool': only max pooling",
        "symbol/onnx_backend",
    ):
        assert expected in str(error.value)


def test_missing_weights_are_named() -> None:
    graph = S.Convolution(var("data"), kernel=(1, 1), num_filter=2, name="conv")
    with pytest.raises(ValueError, match="no value for conv_weight, conv_bias"):
        export(graph, {}, data=(1, 3, 4, 4))


def test_weights_of_another_network_are_named() -> None:
    graph = S.Convolution(var("data"), kernel=(1, 1), num_filter=2, no_bias=True, name="conv")
    with pytest.raises(ValueError, match=r"needs conv_weight \(2, 3, 1, 1\), got \(2, 4, 1, 1\)"):
        export(graph, {"conv_weight": np.zeros((2, 4, 1, 1), np.float32)}, data=(1, 3, 4, 4))


def test_a_shape_that_no_free_batch_size_has_is_refused() -> None:
    graph = S.slice_axis(S.Reshape(var("data"), shape=(-1,), name="flat"), axis=0, begin=1, end=None, name="rest")
    with pytest.raises(ValueError, match="slice_axis 'rest' has the shape"):
        export(graph, {}, data=(1, 3))


def test_operators_without_an_onnx_function() -> None:
    """Losses, and what passes put in for torch."""
    losses = {op for op, row in OPS.items() if row.in_loss} | {"_cast_weight", "_batch_norm"}
    fused = {"_convolution_relu", "_convolution_add", "_add_relu"}
    assert OPS.keys() - ONNX.lowerings.keys() <= losses | fused
