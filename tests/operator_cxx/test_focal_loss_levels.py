import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from operator_cxx import library
from operator_cxx.focal_loss import _op, focal_loss, focal_loss_levels
from tests.operator_cxx.focal_loss_cases import by_reference, levels_of, sample, value_and_gradient

HALVES = [torch.float16, torch.bfloat16]
COMPILED = ["compiled", "emulated"] + ["cuda"] * torch.cuda.is_available()
kernels_only = pytest.mark.parametrize("device", COMPILED, indirect=True)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "flat": lambda x: x.flatten(2),
    "flat, channels last": lambda x: x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2),
    "part of a wider map": lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2],
    "part of more channels": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "part of more channels, channels last": lambda x: torch.cat([x, x], dim=1).contiguous(
        memory_format=torch.channels_last
    )[:, : x.shape[1]],
    "every other channel": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}

DENSE = ["contiguous", "channels last", "flat", "flat, channels last"]  # the gradients keep these layouts


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_levels_of_any_layout(layout, dtype, device, monkeypatch):
    sizes, A, C = [(5, 7), (0, 3), (4, 4), (1, 1), (1, 2)], 3, 5
    logit, label = sample(2, 3 * 54, C, dtype=dtype)
    maps = [LAYOUTS[layout](m).to(device) for m in levels_of(logit, sizes, A)]
    label = label.to(device)

    def loss(*maps):
        return focal_loss_levels(maps, label, num_class=C, alpha=0.25, gamma=2.0)

    value, grads = value_and_gradient(loss, *maps)
    expected, expected_grads = by_reference(monkeypatch, loss, *maps)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 2e-6)  # two roundings to the type
    # 3e-8: 2^-25, by which a rounding moves a subnormal float16
    for level, grad, wanted in zip(maps, grads, expected_grads, strict=True):
        assert (grad.dtype, grad.shape) == (dtype, level.shape)
        torch.testing.assert_close(grad.double(), wanted, rtol=tolerance, atol=3e-8)
        if library.loaded and layout in DENSE and min(level.shape[2:]) > 1:
            assert grad.stride() == level.stride()


@pytest.mark.parametrize(
    "N, K, C", [(0, 3, 2), (2, 0, 2), (2, 3, 0), (1, 1, 1), (3, 700, 1), (2, 300, 3), (1, 3, 2500)]
)
def test_sizes(N, K, C, device, monkeypatch):
    logit, label = sample(N, K, C)
    logit, label = logit.to(device), label.to(device)

    def loss(x):
        return focal_loss(x, label, alpha=0.25, gamma=2.0)

    for x in (logit, logit.transpose(1, 2).contiguous().transpose(1, 2)):
        value, (grad,) = value_and_gradient(loss, x)
        expected, (wanted,) = by_reference(monkeypatch, loss, x)
        assert value.item() == pytest.approx(expected.item(), rel=1e-6)
        if library.loaded:
            assert grad.stride() == torch.empty_like(x).stride()
        torch.testing.assert_close(grad.double(), wanted, rtol=2e-6 if library.loaded else 2e-5, atol=0)


@kernels_only
@pytest.mark.parametrize("C", [1, 40])
def test_rows_longer_than_a_block(C, device, monkeypatch):
    logit, label = sample(1, 16_800, C)
    logit, label = logit.transpose(1, 2).contiguous().to(device), label.to(device)
    loss = lambda x: focal_loss_levels([x], label, num_class=C, alpha=0.25, gamma=1.5)  # noqa: E731
    value, (grad,) = value_and_gradient(loss, logit)
    expected, (wanted,) = by_reference(monkeypatch, loss, logit)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(grad.double(), wanted, rtol=2e-6, atol=0)


def run_kernel(logit, grad, label):
    """Return the sum over (N, A, C, P) without a normalizer, and write its gradient to `grad`."""
    kernels, (N, A, C, P) = library.loaded[logit.device.type], logit.shape
    loss = torch.zeros((), dtype=torch.float64, device=logit.device)
    scale = torch.ones(N, dtype=torch.float64, device=logit.device)
    kernels.run(
        *("focal_loss", logit, logit, grad, library.DTYPES[logit.dtype], N, A, P, C, logit.stride(), grad.stride()),
        *(label, A * P, scale, 0.25, 2.0, loss, kernels.workspace("focal_loss", logit, N, A, P, C)),
    )
    return loss.item()


@kernels_only
@pytest.mark.parametrize("strides", [(2**31 + 8, 3, 1), (3, 2**31 + 8, 1), (2, 1, 2**31 + 8)])
def test_strides_beyond_32_bits(strides, device):
    # About 4 GiB of address space, of which a few pages are touched.
    logit, label = sample(2, 2, 2, dtype=torch.bfloat16)
    logit, label = logit.to(device).unsqueeze(1), label.float().to(device)  # (N, A = 1, C, P)

    def spread():
        memory = torch.empty(sum(strides) + 1, dtype=torch.bfloat16, device=device)
        return memory.as_strided((2, 2, 2), strides).unsqueeze(1)

    x, grad, dense_grad = spread(), spread(), torch.empty_like(logit)
    x.copy_(logit)
    assert run_kernel(x, grad, label) == pytest.approx(run_kernel(logit, dense_grad, label), rel=1e-6)
    assert torch.equal(grad, dense_grad)


@kernels_only
def test_a_gradient_of_another_layout(device):
    N, A, C, P = 2, 3, 4, 20
    logit, label = sample(N, A * P, C)
    logit = logit.reshape(N, A, P, C).transpose(2, 3).contiguous().to(device)
    label = label.float().to(device)
    expected = torch.empty_like(logit)
    loss = run_kernel(logit, expected, label)
    assert 0 not in expected[label.reshape(N, A, 1, P).expand_as(logit) >= 0]
    for order in itertools.permutations(range(4)):
        back = [order.index(i) for i in range(4)]
        x = logit.permute(order).contiguous().permute(back)
        for out in (x, logit):
            grad = torch.empty_like(out)
            assert run_kernel(x, grad, label) == pytest.approx(loss, rel=1e-6)
            assert torch.equal(grad, expected)
        grad = torch.empty_like(x)
        assert run_kernel(logit, grad, label) == pytest.approx(loss, rel=1e-6)
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("device", ["compiled"], indirect=True)
def test_the_number_of_threads_changes_no_bit(device):
    logit, label = sample(2, 5000, 8)
    maps = levels_of(logit, [(50, 50), (50, 50)], A=1)
    loss = lambda *m: focal_loss_levels(m, label, num_class=8, alpha=0.25, gamma=2.0)  # noqa: E731
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(value_and_gradient(loss, *maps))
        results.append(value_and_gradient(lambda x: focal_loss(x, label, alpha=0.25, gamma=2.0), logit))
    for value, grads in results[2:]:
        first, first_grads = results[0] if len(grads) == 2 else results[1]
        assert value.item() == first.item()
        assert all(torch.equal(a, b) for a, b in zip(grads, first_grads, strict=True))


def test_many_callers_at_once(device):
    cases = [sample(1, 200, 4, seed=seed) for seed in range(16)]
    cases = [(logit.to(device), label.to(device)) for logit, label in cases]

    def loss(case):
        logit, label = case
        return value_and_gradient(lambda x: focal_loss(x, label, alpha=0.25, gamma=2.0), logit)

    alone = [loss(case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(loss, cases))
    for (a, (grad_a,)), (b, (grad_b,)) in zip(alone, together, strict=True):
        assert a.item() == b.item()
        assert torch.equal(grad_a, grad_b)


@kernels_only
def test_memory_is_that_of_the_gradient(device):
    logit, label = sample(2, 4000, 20)
    maps = [m.to(device).requires_grad_() for m in levels_of(logit, [(50, 40), (40, 50)], A=1)]
    label = label.float().to(device)

    def step():
        torch.autograd.grad(focal_loss_levels(maps, label, num_class=20, alpha=0.25, gamma=2.0), maps)

    step()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        step()
    allocated = sum(max(0, event.nbytes()) for event in memory_events(profile))
    assert logit.nbytes <= allocated < 1.1 * logit.nbytes


def memory_events(profile):
    """Return all allocations and releases that the profiler recorded."""
    return [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]


@kernels_only
def test_torch_library_rules(device):
    logit, label = sample(2, 6, 4)
    level = logit.reshape(2, 1, 6, 4).transpose(2, 3).to(device)
    scale = torch.ones(2, dtype=torch.float64, device=device)
    for dtype, with_grad in ((torch.float32, True), (torch.float16, False)):
        leaf = level.detach().to(dtype).requires_grad_()
        torch.library.opcheck(_op, ([leaf, leaf], label.repeat(1, 2).float(), scale, 0.25, 2.0, with_grad))


def test_compile_and_export(device):
    logit, label = sample(2, 18, 4)
    maps = [m.to(device) for m in levels_of(logit, [(4, 4), (2, 1)], A=1)]
    label = label.to(device)

    class Loss(torch.nn.Module):
        def forward(self, first, second, label):
            return focal_loss_levels([first, second], label, num_class=4, alpha=0.25, gamma=2.0)

    def eager(*maps):
        return Loss()(*maps, label)

    compiled = torch.compile(Loss(), fullgraph=True, backend="aot_eager")
    value, grads = value_and_gradient(eager, *maps)
    same, same_grads = value_and_gradient(lambda *m: compiled(*m, label), *maps)
    assert same.item() == pytest.approx(value.item(), rel=1e-6)
    torch.testing.assert_close(same_grads, grads)
    exported = torch.export.export(Loss(), (*maps, label)).module()
    assert exported(*maps, label).item() == pytest.approx(value.item(), rel=1e-6)
