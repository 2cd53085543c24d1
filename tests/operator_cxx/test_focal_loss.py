import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operator_cxx import library
from operator_cxx.focal_loss import focal_loss, focal_loss_levels
from tests.operator_cxx.focal_loss_cases import by_reference, levels_of, sample, value_and_gradient

GOLDEN = Path(__file__).parents[1] / "golden"
HALVES = [torch.float16, torch.bfloat16]

COMPILED = ["compiled", "emulated"] + ["cuda"] * torch.cuda.is_available()
kernels_only = pytest.mark.parametrize("device", COMPILED, indirect=True)


def slow_term(x, is_positive, alpha, gamma):
    """Return the loss of a logit and its derivative in Python floats, without cancellation at any x."""
    z = -x if is_positive else x
    e = math.exp(-abs(z))
    s, other = (e / (1 + e), 1 / (1 + e)) if z < 0 else (1 / (1 + e), e / (1 + e))
    softplus = max(z, 0) + math.log1p(e)
    weight = alpha if is_positive else 1 - alpha
    slope = weight * s**gamma * (gamma * other * softplus + s)
    return weight * s**gamma * softplus, -slope if is_positive else slope


def slow_focal_loss(logit, label, alpha, gamma):
    """Return the sum over all pairs by the definition, in Python floats."""
    total = 0.0
    for row, cls in zip(logit.reshape(-1, logit.shape[-1]).tolist(), label.flatten().tolist(), strict=True):
        for c, x in enumerate(row, start=1):
            p = 1 / (1 + math.exp(-x))
            if cls == c:
                total -= alpha * (1 - p) ** gamma * math.log(p)
            elif cls >= 0:
                total -= (1 - alpha) * p**gamma * math.log(1 - p)
    return total


@pytest.mark.parametrize("case", ["fpn_128", "nasfpn_128x256", "tdbu_128"])
def test_loss_of_the_original(case, device):
    golden = np.load(GOLDEN / f"{case}.npz")
    logit, label = (torch.from_numpy(golden[key]).to(device) for key in ("train_cls", "label"))
    loss = focal_loss(logit, label, alpha=0.25, gamma=2.0)
    assert loss.item() == pytest.approx(golden["loss"][0], rel=1e-5)


def test_by_hand(device):
    # p = 0.5 everywhere. Anchor 1 (class 2): 0.75 * 0.25 ln2 + 0.25 * 0.25 ln2; anchor 2 (background):
    # 2 * 0.75 * 0.25 ln2; anchor 3 (ignored): 0. One foreground anchor: the normalizer is 2.
    label = torch.tensor([[2.0, 0.0, -1.0]], device=device)
    logit = torch.zeros(1, 3, 2, device=device)
    expected = (0.25 + 0.375) * math.log(2) / 2
    assert focal_loss(logit, label, alpha=0.25, gamma=2.0).item() == pytest.approx(expected)
    maps = [logit[:, :1].reshape(1, 2, 1, 1), logit[:, 1:].reshape(1, 2, 1, 2)]
    assert focal_loss_levels(maps, label, num_class=2, alpha=0.25, gamma=2.0).item() == pytest.approx(expected)


def test_order_of_the_anchors_of_a_level(device):
    # Map (1, A=2 * C=2, H=1, W=2); all logits differ, so that a wrong order gives a wrong gradient.
    logit = torch.tensor([[[[-1.0, -2.0]], [[-3.0, -4.0]], [[-5.0, -6.0]], [[-7.0, -8.0]]]], device=device)
    label = torch.tensor([[1, 0, 0, 2]], device=device)  # anchor 0: cells 0, 1; anchor 1: cells 0, 1
    loss = lambda x: focal_loss_levels([x], label, num_class=2, alpha=0.25, gamma=2.0)  # noqa: E731
    _, (grad,) = value_and_gradient(loss, logit)
    assert (grad < 0).flatten().tolist() == [True, False, False, False, False, False, False, True]


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.5, 0.0), (0.75, 0.5), (1.0, 1.5), (0.0, 1.0), (0.25, 5.0)])
def test_against_the_definition(alpha, gamma, device):
    logit, label = sample(2, 30, 4, dtype=torch.float64)
    loss = focal_loss(logit.to(device), label.to(device), alpha=alpha, gamma=gamma)
    expected = slow_focal_loss(logit, label, alpha, gamma)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected / ((label >= 1).sum().item() + 1), rel=1e-11)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 1.7, 2.0, 5.0])
@pytest.mark.parametrize("is_positive", [False, True])
def test_every_term_is_exact_to_a_millionth_of_itself(gamma, is_positive, device):
    sizes = torch.cat([torch.logspace(-4, 1.3, 40), torch.tensor([0.0, 24.0, 27.9, 60.0, 83.0, 1e4])])
    x = torch.cat([-sizes, sizes])  # float32
    label = torch.full((1, len(x)), float(is_positive), device=device)
    alpha, one = 0.3, torch.ones((), device=device)
    expected = [slow_term(value, is_positive, alpha, gamma) for value in x.tolist()]

    def loss(logit):
        return focal_loss(logit, label[:, : logit.shape[1]], alpha=alpha, gamma=gamma, normalizer=one)

    _, (grad,) = value_and_gradient(loss, x[None, :, None].to(device))
    terms = torch.stack([loss(value.to(device).reshape(1, 1, 1)) for value in x])
    tiny = 1.2e-38  # smaller values have reduced precision in float32
    # Plain torch rounds the exponent of a power, as do kernels for processors without fused multiply-add.
    kernels = library.loaded.get(device.type)
    fused = kernels and (device.type == "cuda" or "fma" in kernels.info.get("features", ()))
    rel = 2e-5 if not kernels else 1e-6 if fused or gamma == 2 else 3e-6
    assert terms.tolist() == pytest.approx([term for term, _ in expected], rel=rel, abs=tiny)
    assert grad.flatten().tolist() == pytest.approx([slope for _, slope in expected], rel=rel, abs=tiny)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradient(gamma, device):
    logit = torch.linspace(-6, 6, 24, dtype=torch.float64, device=device).reshape(2, 4, 3).requires_grad_()
    label = torch.tensor([[0, 1, 2, 3], [-1, 3, 0, 1]], device=device)
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, label, alpha=0.25, gamma=gamma), logit)
    maps = [m.detach().requires_grad_() for m in levels_of(logit, [(1, 1), (1, 3)], A=1)]
    assert torch.autograd.gradcheck(
        lambda *m: focal_loss_levels(m, label, num_class=3, alpha=0.25, gamma=gamma), tuple(maps)
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [20.0, 100.0, 1e4, 1e30])
def test_huge_logits(gamma, size, device):
    # Two confident correct pairs have loss 0; two confident wrong ones |logit| times their weight.
    logit = torch.tensor([[[size, -size], [-size, size]]], requires_grad=True, device=device)
    label = torch.tensor([[1.0, 1.0]], device=device)
    loss = focal_loss(logit, label, alpha=0.25, gamma=gamma)
    assert loss.item() == pytest.approx((0.25 + 0.75) * size / 3, rel=1e-6)
    (grad,) = torch.autograd.grad(loss, logit)
    expected = torch.tensor([[[0.0, 0.0], [-0.25, 0.75]]]) / 3
    torch.testing.assert_close(grad.cpu(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_an_infinite_logit_has_loss_zero_where_it_is_right(gamma, dtype, device):
    logit = torch.tensor([[[math.inf, -math.inf]]], dtype=dtype, device=device)
    label = torch.tensor([[1]], device=device)
    value, (grad,) = value_and_gradient(lambda x: focal_loss(x, label, alpha=0.25, gamma=gamma), logit)
    assert value.item() == 0
    assert grad.tolist() == [[[0.0, 0.0]]]
    assert focal_loss(-logit, label, alpha=0.25, gamma=gamma).item() == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("worst", [math.nan, math.inf, -math.inf])
def test_an_ignored_anchor_adds_nothing_whatever_its_logits_are(worst, gamma, dtype, device):
    logit, label = sample(1, 40, 3, dtype=dtype)
    label[0, ::5] = -1
    clean = torch.where(label[..., None] < 0, 0.0, logit)
    logit = torch.where(label[..., None] < 0, worst, logit)
    maps = levels_of(logit, [(4, 5)], A=2)
    label = label.to(device)

    def loss(x):
        return focal_loss(x, label, alpha=0.25, gamma=gamma)

    def loss_of_map(x):
        return focal_loss_levels([x], label, num_class=3, alpha=0.25, gamma=gamma)

    value, (grad,) = value_and_gradient(loss, logit.to(device))
    assert value.item() == value_and_gradient(loss, clean.to(device))[0].item()
    assert torch.equal((grad == 0).all(2), label < 0)
    value, (grad,) = value_and_gradient(loss_of_map, maps[0].to(device))
    assert value.item() == pytest.approx(loss(clean.to(device)).item(), rel=1e-6)
    assert torch.equal((grad.unflatten(1, (2, 3)) == 0).all(2).flatten(1), label < 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_nan_elsewhere_propagates(at, alpha, gamma, dtype, device):
    logit = torch.zeros(1, 20, 3, dtype=dtype, device=device)
    logit[0, 7, at] = math.nan
    label = torch.full((1, 20), 2, device=device)
    value, (grad,) = value_and_gradient(lambda x: focal_loss(x, label, alpha=alpha, gamma=gamma), logit)
    assert value.isnan()
    assert torch.equal(grad.isnan(), logit.isnan())


def test_normalizer(device):
    logit, label = torch.zeros(2, 1, 1, device=device), torch.tensor([[1], [0]], device=device)
    loss = [0.25 * 0.25 * math.log(2), 0.75 * 0.25 * math.log(2)]  # of each image

    def divided_by(normalizer):
        normalizer = torch.tensor(normalizer, device=device)
        value = focal_loss(logit, label, alpha=0.25, gamma=2.0, normalizer=normalizer)
        maps = [logit.reshape(2, 1, 1, 1)]
        same = focal_loss_levels(maps, label, num_class=1, alpha=0.25, gamma=2.0, normalizer=normalizer)
        assert same.item() == value.item()
        return value.item()

    assert divided_by(4.0) == pytest.approx(sum(loss) / 4)
    assert divided_by([4.0, 4.0]) == pytest.approx(sum(loss) / 4)
    assert divided_by([1.0, 2.0]) == pytest.approx(loss[0] + loss[1] / 2)


def test_the_normalizer_gets_no_gradient(device):
    normalizer = torch.tensor(2.0, device=device, requires_grad=True)
    logit = torch.zeros(1, 1, 1, device=device, requires_grad=True)
    loss = focal_loss(logit, torch.zeros(1, 1, device=device), alpha=0.25, gamma=2.0, normalizer=normalizer)
    assert torch.autograd.grad(loss, [logit, normalizer], allow_unused=True)[1] is None


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_computed_in_float32(dtype, device):
    logit, label = sample(2, 30, 5, dtype=dtype)
    logit, label = logit.to(device), label.to(device)
    loss = lambda x: focal_loss(x, label, alpha=0.25, gamma=2.0)  # noqa: E731
    value, (grad,) = value_and_gradient(loss, logit)
    same, (wide,) = value_and_gradient(loss, logit.float())
    assert (value.dtype, grad.dtype) == (torch.float32, dtype)
    assert value.item() == pytest.approx(same.item(), rel=1e-6)
    assert torch.equal(grad, wide.to(dtype))


def test_a_loss_scaler_saves_the_gradient_of_float16(device):
    # 0.75 p^2 (...) / 1000 is below 2^-25, half of the smallest float16, before the loss scale is applied.
    logit = torch.full((1, 1, 1), -4.0, dtype=torch.float16, device=device)
    label, count = torch.zeros(1, 1, device=device), torch.tensor(1000.0, device=device)
    loss = lambda x: 65536 * focal_loss(x, label, alpha=0.25, gamma=2.0, normalizer=count)  # noqa: E731
    _, (grad,) = value_and_gradient(loss, logit)
    assert grad.item() == pytest.approx(slow_term(-4.0, False, 0.25, 2.0)[1] / 1000 * 65536, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gradient_of_the_loss_scales_that_of_the_logits(dtype, device):
    logit, label = sample(2, 30, 4, dtype=dtype)
    logit, label = logit.to(device), label.to(device)
    _, (one,) = value_and_gradient(lambda x: focal_loss(x, label, alpha=0.25, gamma=2.0), logit)
    _, (three,) = value_and_gradient(lambda x: -3 * focal_loss(x, label, alpha=0.25, gamma=2.0), logit)
    torch.testing.assert_close(three, -3 * one, rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=2e-7)
    leaf = logit.clone().requires_grad_()
    loss = focal_loss(leaf, label, alpha=0.25, gamma=2.0)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * one)


@kernels_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_second_derivative_is_refused(dtype, device):
    logit = torch.zeros(1, 2, 2, dtype=dtype, device=device, requires_grad=True)
    loss = focal_loss(logit, torch.zeros(1, 2, device=device), alpha=0.25, gamma=2.0)
    (grad,) = torch.autograd.grad(loss, logit, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


@st.composite
def problems(draw):
    N, K, C = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 9))
    numbers = st.floats(-100, 100, width=32) | st.sampled_from([0.0, -0.0, 1e4, -1e4, 1e-30, 87.5, -88.0, -87.7])
    logit = draw(st.lists(numbers, min_size=8, max_size=8))
    label = draw(st.lists(st.integers(-1, C), min_size=7, max_size=7))
    logit = torch.tensor(logit).repeat(N * K * C)[: N * K * C].reshape(N, K, C)
    label = torch.tensor(label).repeat(N * K)[: N * K].reshape(N, K)
    alpha = draw(st.floats(0, 1))
    gamma = draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, 2.5]) | st.floats(0, 10))
    return logit, label, alpha, gamma, draw(st.booleans())


@pytest.mark.parametrize("implementation", ["compiled", "emulated"])
@settings(derandomize=True, deadline=None, max_examples=60)
@given(problem=problems())
def test_search_for_a_disagreement_with_plain_torch(implementation, problem, emulated_kernels):
    logit, label, alpha, gamma, map_like = problem
    logit = logit.transpose(1, 2).contiguous().transpose(1, 2) if map_like else logit

    def loss(x):
        return focal_loss(x, label, alpha=alpha, gamma=gamma)

    with pytest.MonkeyPatch.context() as patch:
        if implementation == "emulated":
            patch.setattr(library, "loaded", {"cpu": emulated_kernels})
        value, (grad,) = value_and_gradient(loss, logit)
        expected, (wanted,) = by_reference(patch, loss, logit)
    assert value.item() == pytest.approx(expected.item(), rel=5e-6, abs=1e-37)
    torch.testing.assert_close(grad.double(), wanted, rtol=3e-6, atol=1e-37)


def test_wrong_arguments_are_named(device):
    zeros = torch.zeros(1, 3, 2, device=device)
    label, levels = zeros[..., 0], [zeros.transpose(1, 2)]
    with pytest.raises(ValueError, match=r"label \(N, K\), got \(1, 3, 2\) and \(1, 2\)"):
        focal_loss(zeros, label[:, :2], alpha=0.25, gamma=2.0)
    with pytest.raises(ValueError, match="expected gamma >= 0, got -1"):
        focal_loss(zeros, label, alpha=0.25, gamma=-1)
    with pytest.raises(ValueError, match="expected gamma >= 0, got nan"):
        focal_loss(zeros, label, alpha=0.25, gamma=math.nan)
    with pytest.raises(ValueError, match=r"expected normalizer \(\) or \(1,\), got \(2,\)"):
        focal_loss(zeros, label, alpha=0.25, gamma=2.0, normalizer=torch.ones(2, device=device))
    with pytest.raises(ValueError, match=r"focal_loss: expected levels of one floating-point type, got torch\.int64"):
        focal_loss(zeros.long(), label, alpha=0.25, gamma=2.0)
    for maps, wrong in (
        (levels, label[:, :2]),
        (levels, label[0]),
        ([zeros], label),
        ([levels[0][..., None, None]], label),
        ([], label),
    ):
        with pytest.raises(ValueError, match=r"focal_loss_levels: expected levels \(N, A\*2, H, W\)"):
            focal_loss_levels(maps, wrong, num_class=2, alpha=0.25, gamma=2.0)
    with pytest.raises(ValueError, match="focal_loss_levels: expected num_class >= 1, got 0"):
        focal_loss_levels(levels, label, num_class=0, alpha=0.25, gamma=2.0)
    with pytest.raises(ValueError, match=r"one floating-point type, got torch\.float32, torch\.float64"):
        focal_loss_levels([levels[0], levels[0].double()], label.repeat(1, 2), num_class=2, alpha=0.25, gamma=2.0)
