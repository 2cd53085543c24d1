"""Compare each operator with its definition, written in plain numpy. N images, C channels or classes, K anchors."""

import itertools
import math

import numpy as np
import pytest
import torch

import symbol as S
from symbol import Group, lower, var
from symbol.torch_backend import layout
from symbol.torch_backend.batch_norm import batch_norm as batch_norm_function


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(op, *inputs, training=True, **attrs):
    """Return the outputs of one node, lowered from a graph."""
    names = [f"x{i}" for i in range(len(inputs))]
    module = lower(S.create(op, *map(var, names), name="node", **attrs)).train(training)
    return module(**dict(zip(names, inputs, strict=True)))


def windows(data, kernel, stride, pad, fill, dilate=(1, 1), ceil=False):
    """Yield (row, column, window) per position; windows are (N, C, kh, kw), cut out of the padded data."""
    sides = []
    for side, k, s, p, d in zip(data.shape[2:], kernel, stride, pad, dilate, strict=True):
        span = side + 2 * p - d * (k - 1) - 1
        sides.append((math.ceil(span / s) if ceil else span // s) + 1)
    edge = [(p, p + s * k) for p, s, k in zip(pad, stride, kernel, strict=True)]
    padded = np.pad(data, ((0, 0), (0, 0), *edge), constant_values=fill)
    for i, j in itertools.product(*map(range, sides)):
        rows = i * stride[0] + dilate[0] * np.arange(kernel[0])
        columns = j * stride[1] + dilate[1] * np.arange(kernel[1])
        yield i, j, padded[:, :, rows][:, :, :, columns]


@pytest.mark.parametrize(
    "stride, pad, dilate, group",
    [
        ((1, 1), (0, 0), (1, 1), 1),
        ((2, 1), (1, 2), (1, 1), 1),
        ((1, 2), (2, 0), (2, 1), 1),
        ((1, 1), (1, 1), (1, 1), 2),
    ],
)
def test_convolution(stride, pad, dilate, group):
    data, weight, bias = random(2, 4, 7, 6), random(6, 4 // group, 3, 2, seed=1), random(6, seed=2)
    module = S.Convolution(
        *(var("x"), var("c_weight"), var("c_bias")),
        **{"kernel": (3, 2), "stride": stride, "pad": pad, "dilate": dilate, "num_group": group},
        num_filter=6,
        name="c",
    )
    module = lower(module, x=data.shape).double()
    module.load_state_dict({"c_weight": weight, "c_bias": bias})
    out = module(x=data)[0].detach().numpy()
    for i, j, window in windows(data.numpy(), (3, 2), stride, pad, 0.0, dilate):
        for filter in range(6):
            first = filter // (6 // group) * (4 // group)
            channels = window[:, first : first + 4 // group]
            expected = (channels * weight[filter].numpy()).sum((1, 2, 3)) + bias[filter].item()
            np.testing.assert_allclose(out[:, filter, i, j], expected, rtol=1e-9)
    assert out.shape[2:] == (i + 1, j + 1)


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize(
    "kernel, stride, pad", [((2, 2), (2, 2), (0, 0)), ((3, 3), (2, 3), (1, 1)), ((3, 3), (1, 2), (1, 0))]
)
def test_max_pooling(kernel, stride, pad, ceil):
    data = random(2, 3, 8, 10)
    attrs = {"kernel": kernel, "stride": stride, "pad": pad, "pooling_convention": "full" if ceil else "valid"}
    out = run("Pooling", data, pool_type="max", **attrs)[0].numpy()
    for i, j, window in windows(data.numpy(), kernel, stride, pad, -np.inf, ceil=ceil):
        assert (out[:, :, i, j] == window.max((2, 3))).all()
    assert out.shape[2:] == (i + 1, j + 1)


def test_average_pooling_counts_the_padding():
    out = run("Pooling", torch.ones(1, 1, 4, 4), pool_type="avg", kernel=(2, 2), stride=(2, 2), pad=(1, 1))[0]
    assert out[0, 0].tolist() == [[0.25, 0.5, 0.25], [0.5, 1.0, 0.5], [0.25, 0.5, 0.25]]


def test_average_pooling_of_a_window_past_the_padding():
    # 5 cells in windows of 2 by 2: the convention "full" adds a window with one cell of data and none of padding
    out = run(
        "Pooling", torch.ones(1, 1, 5, 2), pool_type="avg", kernel=(2, 2), stride=(2, 2), pooling_convention="full"
    )
    assert out[0][0, 0].tolist() == [[1.0], [1.0], [1.0]]


def test_global_pooling_ignores_the_kernel():
    data = random(2, 3, 4, 5)
    attrs = {"kernel": (1, 1), "global_pool": True}
    assert (run("Pooling", data, pool_type="max", **attrs)[0].numpy() == data.numpy().max((2, 3), keepdims=True)).all()
    mean = run("Pooling", data, pool_type="avg", **attrs)[0].numpy()
    np.testing.assert_allclose(mean, data.numpy().mean((2, 3), keepdims=True))


@pytest.mark.parametrize(
    "act_type, expected",
    [
        ("relu", lambda x: np.maximum(x, 0)),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x))),
        ("tanh", np.tanh),
        ("softrelu", lambda x: np.log1p(np.exp(x))),
        ("softsign", lambda x: x / (1 + np.abs(x))),
    ],
)
def test_activations(act_type, expected):
    data = random(100) * 3
    np.testing.assert_allclose(run("Activation", data, act_type=act_type)[0].numpy(), expected(data.numpy()), rtol=1e-9)


def test_upsampling_repeats_and_slice_like_cuts():
    data = random(2, 3, 2, 3)
    up = run("UpSampling", data, scale=4, sample_type="nearest")[0].numpy()
    assert (up == data.numpy().repeat(4, 2).repeat(4, 3)).all()
    like = torch.zeros(1, 2, 2, 2)
    assert (run("slice_like", data, like)[0] == data[:1, :2, :2, :2]).all()
    assert (run("slice_like", data, like, axes=(-1, 1))[0] == data[:, :2, :, :2]).all()


def test_slice_like_that_cuts_nothing_keeps_the_layout_of_its_gradient():
    data = random(2, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = layout.slice_like(data, random(2, 3, 4, 4), axes=())
    above = random(2, 3, 4, 4, seed=1).contiguous(memory_format=torch.channels_last)
    middle = []
    data.register_hook(lambda grad: middle.append(grad.is_contiguous(memory_format=torch.channels_last)))
    out.backward(above)
    assert middle == [True]
    assert torch.equal(data.grad, above)


@pytest.mark.parametrize("axis, begin, end", [(0, 1, 3), (1, -2, None), (-1, 0, -1), (1, 0, 1)])
def test_slice_axis(axis, begin, end):
    data = random(4, 5, 6)
    cut = [slice(None)] * 3
    cut[axis] = slice(begin, end)
    assert (run("slice_axis", data, axis=axis, begin=begin, end=end)[0] == data[tuple(cut)]).all()


def test_arithmetic():
    a, b, c = random(2, 3), random(2, 3, seed=1), random(2, 3, seed=2)
    assert (run("add_n", a, b, c)[0] == a + b + c).all()
    assert (run("add_n", a)[0] == a).all()
    assert (run("elemwise_add", a, b)[0] == a + b).all()
    assert (run("elemwise_sub", a, b)[0] == a - b).all()
    assert (run("elemwise_mul", a, b)[0] == a * b).all()
    assert (run("_mul_scalar", a, scalar=-1.5)[0] == a * -1.5).all()
    column = random(2, 1, seed=3)
    assert (run("broadcast_mul", a, column)[0] == a * column).all()
    assert (run("broadcast_div", a, column)[0] == a / column).all()
    row, one = random(3, seed=4), random(1, seed=5)  # of lower rank: aligned at the last dimension
    assert (run("broadcast_mul", row, a)[0] == a * row).all()
    assert (run("broadcast_div", a, one)[0] == a / one).all()


@pytest.mark.parametrize("op", ["elemwise_add", "elemwise_sub", "elemwise_mul", "add_n"])
def test_elementwise_operators_do_not_broadcast(op):
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(3,\): use broadcast_mul"):
        run(op, random(2, 3), random(3))


def test_layout():
    a, b = random(2, 3, 4), random(2, 5, 4, seed=1)
    assert (run("Concat", a, b, dim=1)[0].numpy() == np.concatenate([a, b], 1)).all()
    assert (run("transpose", a, axes=(2, 0, 1))[0].numpy() == a.numpy().transpose(2, 0, 1)).all()
    assert (run("transpose", a)[0].numpy() == a.numpy().T).all()
    assert (run("Reshape", a, shape=(0, -1))[0].numpy() == a.numpy().reshape(2, 12)).all()
    assert (run("Reshape", a, shape=(-1, 0), reverse=True)[0].numpy() == a.numpy().reshape(6, 4)).all()


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32", "uint8"])
def test_cast(dtype):
    out = run("Cast", torch.tensor([0.0, 1.75]), dtype=dtype)[0]
    assert out.dtype == getattr(torch, dtype)
    assert out.tolist() == ([0, 1] if "int" in dtype else [0.0, 1.75])


def test_smooth_l1():
    # scalar 3: quadratic where |x| < 1/9: 0.5 * 9 * x^2, else |x| - 0.5 / 9
    data = torch.tensor([-1.0, -0.1, 0.0, 0.05, 2.0], dtype=torch.float64, requires_grad=True)
    out = run("smooth_l1", data, scalar=3.0)[0]
    np.testing.assert_allclose(out.detach(), [1 - 0.5 / 9, 0.045, 0, 0.01125, 2 - 0.5 / 9], rtol=1e-12)
    out.sum().backward()
    np.testing.assert_allclose(data.grad, [-1, -0.9, 0, 0.45, 1], rtol=1e-12)


BN = {"gamma": [2.0, 0.5], "beta": [1.0, -1.0], "moving_mean": [10.0, 20.0], "moving_var": [4.0, 9.0]}


def batch_norm(**attrs):
    """Return a module in float64 with the values of BN and eps 0.5, momentum 0.75."""
    x = S.BatchNorm(var("x"), name="b", **{"eps": 0.5, "momentum": 0.75, "fix_gamma": False, **attrs})
    module = lower(x, x=(2, 2, 1, 2)).double()
    module.load_state_dict({f"b_{key}": torch.tensor(value, dtype=torch.float64) for key, value in BN.items()})
    return module


# Channel 0: 1 3 5 7, mean 4, biased variance (9 + 1 + 1 + 9) / 4 = 5. Channel 1: 0 0 2 2, mean 1, variance 1.
BN_DATA = [[[[1.0, 3.0]], [[0.0, 0.0]]], [[[5.0, 7.0]], [[2.0, 2.0]]]]


def affine(mean, var, gamma=BN["gamma"]):
    column = [np.array(v).reshape(1, 2, 1, 1) for v in (mean, var, gamma, BN["beta"])]
    return (np.array(BN_DATA) - column[0]) / np.sqrt(column[1] + 0.5) * column[2] + column[3]


def test_batch_norm_in_training():
    module = batch_norm()
    out = module(x=torch.tensor(BN_DATA, dtype=torch.float64))[0]
    np.testing.assert_allclose(out.detach(), affine([4, 1], [5, 1]), rtol=1e-9)
    # 0.75 * old + 0.25 * batch: 0.75 * 10 + 0.25 * 4 = 8.5, ...; unbiased variances would be 20/3 and 4/3
    np.testing.assert_allclose(module.b_moving_mean, [8.5, 15.25], rtol=1e-9)
    np.testing.assert_allclose(module.b_moving_var, [4.25, 7.0], rtol=1e-9)


def test_batch_norm_in_evaluation():
    module = batch_norm().eval()
    out = module(x=torch.tensor(BN_DATA, dtype=torch.float64))[0]
    np.testing.assert_allclose(out.detach(), affine([10, 20], [4, 9]), rtol=1e-9)
    assert module.b_moving_mean.tolist() == BN["moving_mean"]
    assert module.b_moving_var.tolist() == BN["moving_var"]


def test_global_statistics_also_in_training():
    module = batch_norm(use_global_stats=True)
    out = module(x=torch.tensor(BN_DATA, dtype=torch.float64))[0]
    np.testing.assert_allclose(out.detach(), affine([10, 20], [4, 9]), rtol=1e-9)
    assert module.b_moving_mean.tolist() == BN["moving_mean"]
    out.sum().backward()
    # d out / d gamma is the normalized data: channel 0 (16 - 4 * 10) / sqrt(4.5), channel 1 (4 - 4 * 20) / sqrt(9.5)
    np.testing.assert_allclose(module.b_gamma.grad, [-24 / math.sqrt(4.5), -76 / math.sqrt(9.5)], rtol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_a_fixed_gamma_counts_as_one(training):
    module = batch_norm(fix_gamma=True).train(training)
    out = module(x=torch.tensor(BN_DATA, dtype=torch.float64))[0]
    mean, variance = ([4, 1], [5, 1]) if training else ([10, 20], [4, 9])
    np.testing.assert_allclose(out.detach(), affine(mean, variance, gamma=[1.0, 1.0]), rtol=1e-9)
    out.sum().backward()
    assert module.b_gamma.grad is None or not module.b_gamma.grad.any()


def test_the_gradient_of_batch_norm():
    gamma, beta, mean, variance = (torch.tensor(BN[key], dtype=torch.float64) for key in BN)
    flags = dict.fromkeys(("fix_gamma", "use_global_stats", "sync", "relu"), False)

    def out(data, gamma, beta):
        moving = mean.clone(), variance.clone()
        return batch_norm_function(data, gamma, beta, *moving, True, eps=0.5, no_bias=True, no_residual=True, **flags)[
            0
        ]

    inputs = [random(2, 2, 3, 2), gamma, beta]
    assert torch.autograd.gradcheck(out, [tensor.requires_grad_() for tensor in inputs])


def test_synchronized_batch_norm_on_one_device_is_batch_norm():
    local = batch_norm()
    x = S._contrib_SyncBatchNorm(var("x"), name="b", key="b", eps=0.5, momentum=0.75, fix_gamma=False)
    synced = lower(x, x=(2, 2, 1, 2)).double()
    synced.load_state_dict(local.state_dict())
    data = torch.tensor(BN_DATA, dtype=torch.float64)
    assert (synced(x=data)[0] == local(x=data)[0]).all()
    assert (synced.b_moving_var == local.b_moving_var).all()


def test_half_precision_data_and_full_precision_parameters():
    data = random(2, 2, 3, 4).half()
    x = S.BatchNorm(S.Convolution(var("x"), num_filter=2, kernel=(1, 1), name="c"), name="b", fix_gamma=False)
    module = lower(x, x=data.shape)
    out = module(x=data)[0]
    assert out.dtype == torch.float16
    assert {p.dtype for p in [*module.parameters(), *module.buffers()]} == {torch.float32}
    expected = lower(x, x=data.shape)(x=data.float())[0]
    np.testing.assert_allclose(out.detach().float(), expected.detach(), atol=5e-3)


def loss_and_gradient(op, data, *others, **attrs):
    data = data.clone().requires_grad_()
    loss = run(op, data, *others, **attrs)[0]
    assert loss.shape == ()
    loss.backward()
    return loss.item(), data.grad.numpy()


@pytest.mark.parametrize("normalization, divisor", [("null", 1), ("batch", 2), ("valid", 4)])
def test_make_loss(normalization, divisor):
    # the gradient is grad_scale / divisor everywhere; four numbers lie above the threshold
    data = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.1, 3.0]], dtype=torch.float64)
    attrs = {"normalization": normalization, "grad_scale": 1.5, "valid_thresh": 0.2}
    value, gradient = loss_and_gradient("MakeLoss", data, **attrs)
    assert value == pytest.approx(5.6 * 1.5 / divisor)
    np.testing.assert_allclose(gradient, np.full((2, 3), 1.5 / divisor), rtol=1e-9)


def test_make_loss_without_a_valid_number():
    value, gradient = loss_and_gradient("MakeLoss", torch.tensor([[-1.0, -2.0]]), normalization="valid")
    assert (value, gradient.tolist()) == (-3.0, [[1.0, 1.0]])


LABEL = torch.tensor([[0, 1, 3, -1], [2, 0, -1, 1]])  # foreground: 4


@pytest.mark.parametrize("normalization, divisor", [("null", 1), ("batch", 2), ("valid", 5)])
@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.4, 1.0)])
def test_the_gradient_of_the_focal_loss(alpha, gamma, normalization, divisor):
    logit = random(2, 4, 3) * 2
    attrs = {"alpha": alpha, "gamma": gamma, "normalization": normalization, "grad_scale": 2.0}
    value, gradient = loss_and_gradient("_contrib_FocalLoss", logit, LABEL.double(), **attrs)
    p = 1 / (1 + np.exp(-logit.numpy()))
    # Lin et al. 2017, appendix B, with p_t = p for the positive class and 1 - p for the others
    positive = alpha * (1 - p) ** gamma * (gamma * p * np.log(p) + p - 1)
    negative = (1 - alpha) * p**gamma * (p - gamma * (1 - p) * np.log(1 - p))
    is_positive = LABEL.numpy()[..., None] == np.arange(1, 4)
    counts = LABEL.numpy()[..., None] >= 0
    expected = np.where(is_positive, positive, negative) * counts * 2.0 / divisor
    np.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-15)
    terms = np.where(is_positive, -alpha * (1 - p) ** gamma * np.log(p), -(1 - alpha) * p**gamma * np.log(1 - p))
    assert value == pytest.approx((terms * counts).sum() * 2.0 / divisor)


@pytest.mark.parametrize("normalization, divisor", [("null", 1), ("batch", 2), ("valid", 5)])
def test_bbox_norm_divides_the_gradient_alone(normalization, divisor):
    data = random(2, 4, 4).requires_grad_()
    out = run("_contrib_BBoxNorm", data, LABEL, normalization=normalization)[0]
    np.testing.assert_allclose(out.detach(), data.detach(), rtol=1e-12)
    head = random(2, 4, 4, seed=1)
    out.backward(head)
    np.testing.assert_allclose(data.grad, head / divisor, rtol=1e-9)


@pytest.mark.parametrize("sync", [False, True])
def test_the_box_loss_of_the_original(sync):
    """MakeLoss(weight * smooth_l1(BBoxNorm(delta - target))): the norm stands before the smooth L1, so it changes
    neither which deltas count as small nor the value that MXNet shows; the gradient is divided by the count + 1."""
    delta, target = random(2, 4, 4) * 0.3, random(2, 4, 4, seed=1) * 0.3
    weight = (random(2, 4, 4, seed=2) > 0).double()
    difference = S.elemwise_sub(var("delta"), var("target"), name="difference")
    if not sync:
        difference = S._contrib_BBoxNorm(difference, var("label"), name="norm")
    loss = S.elemwise_mul(var("weight"), S.smooth_l1(difference, scalar=3.0, name="smooth"), name="weighted")
    if sync:
        loss = S.broadcast_div(loss, var("count"), name="mean")
    module = lower(Group([S.MakeLoss(loss, name="loss")]))
    inputs = {"delta": delta.clone().requires_grad_(), "target": target, "weight": weight}
    inputs |= {"count": torch.full((1, 1, 1), 7.0)} if sync else {"label": LABEL}
    value = module(**inputs)[0]
    value.backward()
    d, w = (delta - target).numpy(), weight.numpy()
    small = np.abs(d) < 1 / 9
    assert 0 < small.sum() < small.size
    divisor = 7 if sync else 5
    assert value.item() == pytest.approx((w * np.where(small, 4.5 * d * d, np.abs(d) - 0.5 / 9)).sum() / divisor)
    expected = w * np.where(small, 9 * d, np.sign(d)) / divisor
    np.testing.assert_allclose(inputs["delta"].grad, expected, rtol=1e-9, atol=1e-15)


def test_anchors_run_over_cells_then_over_shapes():
    # stride 8, aspect 1: the box (0, 0, 7, 7) times scale 1 and 2 about (3.5, 3.5)
    out = run("_contrib_GenAnchor", torch.zeros(1, 2, 2, 3), scales=(1.0, 2.0), ratios=(1.0,), feature_stride=8)[0]
    base = np.array([[0, 0, 7, 7], [-4, -4, 11, 11]])
    cells = [(8 * j, 8 * i) for i in range(2) for j in range(3)]
    expected = [box + np.array([x, y, x, y]) for x, y in cells for box in base]
    assert out.dtype == torch.float32
    assert out.tolist() == np.array(expected).tolist()


def test_base_anchors_are_constants_of_the_module():
    """They move with the module, so that no batch copies them to its device, and are not saved in checkpoints."""
    graph = S._contrib_GenAnchor(var("data"), scales=(1.0, 2.0), ratios=(1.0,), feature_stride=8)
    module = lower(graph)
    assert module.state_dict() == {}
    assert [(name, tuple(base.shape)) for name, base in module.named_buffers()] == [("_constant0", (2, 4))]
    assert module.to("meta")(data=torch.zeros(1, 2, 2, 3, device="meta"))[0].device.type == "meta"


def test_a_candidate_has_its_score_in_the_column_of_its_class():
    # one anchor per cell, two classes, two cells; zero deltas give the anchors back
    anchors = torch.tensor([[0.0, 0, 7, 7], [8, 0, 15, 7]])
    prob = torch.tensor([[[[0.9, 0.1]], [[0.2, 0.6]]]])  # (N, A*C, H, W)
    boxes, scores = run(
        *("_contrib_GenProposalRetina", prob, torch.zeros(1, 4, 1, 2), torch.tensor([[32.0, 32.0, 1.0]]), anchors),
        num_anchors=1,
        rpn_pre_nms_top_n=5,
        thresh=0.15,
    )
    assert boxes[0].tolist() == [[0, 0, 7, 7], [8, 0, 15, 7], [0, 0, 7, 7], [0, 0, 0, 0], [0, 0, 0, 0]]
    expected = [[0, 0.9, 0], [0, 0, 0.6], [0, 0, 0.2], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(scores[0], expected, rtol=1e-6)
