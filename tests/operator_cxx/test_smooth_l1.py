import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operator_cxx import library
from operator_cxx.reference.smooth_l1 import smooth_l1
from operator_cxx.smooth_l1 import smooth_l1_loss

GOLDEN = Path(__file__).parents[1] / "golden"
LAYOUTS = {
    "contiguous": lambda level: level.contiguous(),
    "channels-last": lambda level: level.contiguous(memory_format=torch.channels_last),
    "columns first": lambda level: level.transpose(2, 3).contiguous().transpose(2, 3),
    "every second image": lambda level: torch.stack([level, level], dim=1).flatten(0, 1)[::2],
}


def slow_loss(delta, target, weight, beta):
    """Return the sum by the definition, in Python floats."""
    total = 0.0
    for d, t, w in zip(delta.flatten().tolist(), target.flatten().tolist(), weight.flatten().tolist(), strict=True):
        size = abs(d - t)
        total += w * (size * size / (2 * beta) if size < beta else size - beta / 2)
    return total


def example(device, *, sides=((5, 7), (3, 3), (1, 1)), images=2, rows=8, dtype=torch.float32, seed=0):
    """Return deltas of levels (N, R, H, W), target and weight (N, R, P)."""
    random = torch.Generator().manual_seed(seed)
    delta = [torch.randn(images, rows, *side, generator=random, dtype=torch.float64) for side in sides]
    shape = (images, rows, sum(h * w for h, w in sides))
    target = torch.randn(shape, generator=random, dtype=torch.float64)
    weight = (torch.rand(shape, generator=random, dtype=torch.float64) > 0.6).double()
    wide = torch.promote_types(dtype, torch.float32)
    return [d.to(device, dtype) for d in delta], target.to(device, wide), weight.to(device, wide)


def value_and_gradients(delta, target, weight, **options):
    delta = [level.detach().requires_grad_() for level in delta]
    loss = smooth_l1_loss(delta, target, weight, **options)
    return loss.detach(), torch.autograd.grad(loss, delta)


def test_elementwise_by_hand():
    # scalar 2: quadratic 2 x^2 below 1/4, then |x| - 1/8.
    x = torch.tensor([-1.0, -0.25, -0.125, 0.0, 0.125, 0.25, 0.5], dtype=torch.float64)
    assert smooth_l1(x, 2.0).tolist() == [0.875, 0.125, 0.03125, 0.0, 0.03125, 0.125, 0.375]


def test_loss_by_hand(device):
    # beta 1/4, as above; weights 1, 2, 1, 0 and the normalizer 2: (0.875 + 2 * 0.03125 + 0 + 0) / 2
    delta = torch.tensor([-1.0, -0.125, 1.0, 9.0], device=device).reshape(1, 2, 1, 2)
    target = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]], device=device)
    weight = torch.tensor([[[1.0, 2.0], [1.0, 0.0]]], device=device)
    loss, (grad,) = value_and_gradients([delta], target, weight, beta=0.25, normalizer=torch.tensor(2.0, device=device))
    assert loss.item() == 0.46875
    assert grad.flatten().tolist() == [-0.5, -0.5, 0.0, 0.0]  # sign / 2, and 2 * x / beta / 2


@pytest.mark.parametrize("case", ["fpn_128", "nasfpn_128x256", "tdbu_128"])
def test_box_loss_of_the_original(device, case):
    golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{case}.npz").items()}
    label = golden["label"]
    # Reorder the label as the deltas: levels (A, H*W) are concatenated to (A, sum of H*W).
    cells = [16 * 16, 8 * 8, 4 * 4, 2 * 2, 1]
    cells = [c * (golden["train_bbox"].shape[2] // 341) for c in cells]
    levels = [part.reshape(len(label), 9, -1) for part in label.split([9 * c for c in cells], dim=1)]
    weight = (torch.cat(levels, 2) >= 1).repeat_interleave(4, dim=1).float()
    delta = [part.to(device) for part in golden["train_bbox"].split(cells, dim=2)]
    count = (label >= 1).sum() + 1
    loss = smooth_l1_loss(
        delta, golden["reg_target"].to(device), weight.to(device), beta=0.11, normalizer=count.to(device)
    )
    assert loss.item() == pytest.approx(golden["loss"][1].item(), rel=1e-5)


@pytest.mark.parametrize("dtype, rel", [("float64", 1e-12), ("float32", 1e-5), ("float16", 1e-5), ("bfloat16", 1e-5)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_the_definition(device, layout, dtype, rel):
    delta, target, weight = example(device, dtype=getattr(torch, dtype))
    expected = slow_loss(torch.cat([level.flatten(2) for level in delta], 2), target, weight, 0.11)
    laid = [LAYOUTS[layout](level) for level in delta]
    loss, grads = value_and_gradients(laid, target, weight, beta=0.11)
    assert loss.item() == pytest.approx(expected, rel=rel)
    assert loss.dtype == target.dtype
    first = 0
    for level, grad in zip(delta, grads, strict=True):
        place = slice(first, first + level.shape[2] * level.shape[3])
        x = level.flatten(2).to(target.dtype) - target[:, :, place]
        slope = torch.where(x.abs() < 0.11, x / 0.11, x.sign()) * weight[:, :, place]
        tolerance = {"float16": 1e-3, "bfloat16": 8e-3}.get(dtype, 1e-6)
        torch.testing.assert_close(grad.flatten(2).to(slope.dtype), slope, rtol=tolerance, atol=tolerance)
        assert grad.dtype == level.dtype
        first = place.stop


def test_the_gradient_has_the_layout_of_its_level():
    delta, target, weight = example("cpu")
    delta = [LAYOUTS["channels-last"](level) for level in delta]
    _, grads = value_and_gradients(delta, target, weight, beta=0.11)
    assert grads[0].is_contiguous(memory_format=torch.channels_last)


def test_images_have_their_own_normalizer(device):
    delta, target, weight = example(device)
    each = [
        smooth_l1_loss([d[i : i + 1] for d in delta], target[i : i + 1], weight[i : i + 1], beta=1.0) for i in (0, 1)
    ]
    divided = smooth_l1_loss(delta, target, weight, beta=1.0, normalizer=torch.tensor([2.0, 5.0], device=device))
    assert divided.item() == pytest.approx((each[0] / 2 + each[1] / 5).item(), rel=1e-6)


def test_nan_and_infinity(device):
    delta = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0], device=device).reshape(4, 1, 1, 1)
    zero, one = torch.zeros(4, 1, 1, device=device), torch.ones(4, 1, 1, device=device)
    losses = [smooth_l1_loss([delta[i : i + 1]], zero[:1], one[:1], beta=1.0).item() for i in range(4)]
    assert math.isnan(losses[0])
    assert losses[1:] == [math.inf, math.inf, 0.0]
    _, (grad,) = value_and_gradients([delta], zero, one, beta=1.0)
    assert grad.flatten()[1:].tolist() == [1.0, -1.0, 0.0]


def test_nothing_to_do(device):
    for images, sides in ((0, ((2, 2),)), (2, ((0, 3), (0, 1))), (1, ((0, 3), (2, 1)))):
        delta, target, weight = example(device, images=images, sides=sides)
        loss, grads = value_and_gradients(delta, target, weight, beta=1.0)
        assert loss.item() == pytest.approx(slow_loss(delta[-1], target, weight, 1.0), rel=1e-6)
        assert [grad.shape for grad in grads] == [level.shape for level in delta]


def test_gradcheck(device):
    delta, target, weight = example(device, sides=((2, 3), (1, 1)), rows=4, dtype=torch.float64)
    delta = [level.requires_grad_() for level in delta]
    assert torch.autograd.gradcheck(lambda *d: 3 * smooth_l1_loss(d, target, weight, beta=0.5), delta)


def test_only_required_gradients_are_computed(device):
    (first, second), target, weight = example(device, sides=((2, 2), (1, 1)))
    first.requires_grad_()
    smooth_l1_loss([first, second], target, weight, beta=1.0).backward()
    assert first.grad is not None
    assert second.grad is None
    with torch.no_grad():
        assert not smooth_l1_loss([first, second], target, weight, beta=1.0).requires_grad


def test_the_threads_change_no_bit():
    delta, target, weight = example("cpu", sides=((40, 33), (9, 9)))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(value_and_gradients(delta, target, weight, beta=0.11))
    for loss, grads in results[1:]:
        assert loss == results[0][0]
        assert all(map(torch.equal, grads, results[0][1]))


def test_from_many_threads_at_once(device):
    delta, target, weight = example(device, sides=((20, 20),))
    expected = smooth_l1_loss(delta, target, weight, beta=0.11)
    with ThreadPoolExecutor(8) as pool:
        losses = list(pool.map(lambda _: smooth_l1_loss(delta, target, weight, beta=0.11), range(32)))
    assert all(torch.equal(loss, expected) for loss in losses)


def test_beyond_two_gigabytes_of_elements(device):
    # The second image is 2^31 + 8 elements after the first; the memory in between is never touched.
    far = 2**31 + 8
    memory = torch.empty(far + 4, dtype=torch.float16, device=device)
    level = memory.as_strided((2, 4, 1, 1), (far, 1, 1, 1)).copy_(torch.arange(8.0).reshape(2, 4, 1, 1))
    loss = smooth_l1_loss([level], torch.zeros(2, 4, 1, device=device), torch.ones(2, 4, 1, device=device), beta=1.0)
    assert loss.item() == 28 - 7 * 0.5  # the sum of 0 to 7, minus 0.5 for each except 0


def test_tracing():
    delta, target, weight = example("cpu", dtype=torch.float64)
    delta = [level.requires_grad_() for level in delta]
    scale = torch.ones(2, dtype=torch.float64)
    flat = [level.detach().flatten(2).requires_grad_() for level in delta]
    torch.library.opcheck(torch.ops.necklace.smooth_l1_loss.default, (flat, target, weight, scale, 0.11, True))
    compiled = torch.compile(
        lambda *d: 2 * smooth_l1_loss(d, target, weight, beta=0.11), fullgraph=True, backend="aot_eager"
    )
    grads = torch.autograd.grad(compiled(*delta), delta)
    expected = torch.autograd.grad(2 * smooth_l1_loss(delta, target, weight, beta=0.11), delta)
    assert all(map(torch.equal, grads, expected))


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, level, target, weight):
            return smooth_l1_loss([level], target, weight, beta=0.11)

    (level, _, _), target, weight = example("cpu", sides=((3, 4), (0, 0), (0, 0)))
    program = torch.export.export(Loss(), (level, target, weight))
    assert "necklace.smooth_l1_loss" in str(program.graph)
    assert torch.equal(program.module()(level, target, weight), smooth_l1_loss([level], target, weight, beta=0.11))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(0, 3), st.integers(1, 9), st.integers(0, 300), st.floats(1e-3, 10), st.integers(0, 2**32 - 1))
def test_search_for_a_disagreement(images, rows, cells, beta, seed):
    delta, target, weight = example("cpu", images=images, rows=rows, sides=((1, cells),), seed=seed)
    compiled = value_and_gradients(delta, target, weight, beta=beta)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "loaded", {})
        plain = value_and_gradients(delta, target, weight, beta=beta)
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda d, t, w: (d[:1], t, w),
            r"expected levels \(N, R, H, W\), target and weight \(N, R, sum of H\*W\), got",
        ),
        (lambda d, t, w: (d, t[0], w), r"target \(8, 45\)"),
        (lambda d, t, w: (d, t, w[:1]), r"weight \(1, 8, 45\)"),
        (lambda d, t, w: ([d[0].double(), *d[1:]], t, w), "one floating-point type, got torch.float32, torch.float64"),
        (lambda d, t, w: ([x.long() for x in d], t, w), "one floating-point type, got torch.int64"),
        (lambda d, t, w: ([x.to("meta") for x in d], t, w), "on one device, got cpu, meta"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=f"smooth_l1_loss: expected .*{message}|{message}"):
        smooth_l1_loss(*change(*example("cpu")), beta=0.11)


def test_refused_settings():
    delta, target, weight = example("cpu")
    with pytest.raises(ValueError, match="expected beta > 0, got 0"):
        smooth_l1_loss(delta, target, weight, beta=0.0)
    with pytest.raises(ValueError, match=r"expected normalizer \(\) or \(2,\), got \(3,\)"):
        smooth_l1_loss(delta, target, weight, beta=1.0, normalizer=torch.ones(3))
    with pytest.raises(ValueError, match="expected scalar > 0, got 0"):
        smooth_l1(torch.zeros(1), 0.0)
