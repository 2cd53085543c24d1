"""Processes with parts of a batch, compared with one process on the whole batch. N images, C channels, H, W."""

import pytest
import torch
import torch.distributed as dist

import symbol as S
from symbol import lower, var
from tests.two_processes import run_in_processes

C = 5


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(dtype=torch.float64, op="_contrib_SyncBatchNorm", **attrs):
    """Return a module with distinct values in its four tensors; momentum 0.75."""
    attrs = {"eps": 1e-3, "momentum": 0.75, "fix_gamma": False, **attrs}
    if op == "_contrib_SyncBatchNorm":
        attrs |= {"key": "b", "ndev": 8}
    module = lower(S.create(op, var("x"), name="b", **attrs), x=(2, C, 3, 3)).to(dtype)
    values = {"gamma": random(C) + 2, "beta": random(C, seed=1), "moving_mean": random(C, seed=2)}
    values["moving_var"] = random(C, seed=3).abs() + 1
    module.load_state_dict({f"b_{name}": value.to(dtype) for name, value in values.items()})
    return module


def results(module, data, head):
    """Return the output, the gradient of sum(head * output) and the moving statistics after one call, by name."""
    data = data.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = module(x=data)[0]
    out.backward(head)
    found = {"out": out.detach(), "data": data.grad}
    found |= {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return found | dict(module.named_buffers())


def by_parts(rank, cases, attrs):
    found = []
    for parts, heads in cases:
        found.append(
            results(layer(torch.promote_types(parts[0].dtype, torch.float32), **attrs), parts[rank], heads[rank])
        )
    return found


def whole_and_parts(sizes, *cases, **attrs):
    """Return, per case (data, head), `results` of one process with all images, and of one process per size, joined.

    The gradients of parameters are summed over the processes.
    """
    split = [(data.split(sizes), head.split(sizes)) for data, head in cases]
    by_rank = run_in_processes(by_parts, split, attrs, size=len(sizes))
    pairs = []
    for (data, head), ranks in zip(cases, zip(*by_rank, strict=True), strict=True):
        whole = results(layer(torch.promote_types(data.dtype, torch.float32), **attrs), data, head)
        joined = {name: torch.cat([rank[name] for rank in ranks]) for name in ("out", "data")}
        joined |= {name: sum(rank[name] for rank in ranks) for name in whole if name in ("b_gamma", "b_beta")}
        for name in ("b_moving_mean", "b_moving_var"):
            assert all(torch.equal(rank[name], ranks[0][name]) for rank in ranks)
            joined[name] = ranks[0][name]
        pairs.append((whole, joined))
    return pairs


def assert_equal(parts, whole, tolerance):
    for name, expected in whole.items():
        torch.testing.assert_close(
            parts[name], expected, rtol=tolerance, atol=tolerance, msg=lambda message, name=name: f"{name}: {message}"
        )


def sample(dtype=torch.float64):
    """Data and head (4, C, 6, 7). The first image differs, so that a part's own statistics are not the whole's."""
    data = random(4, C, 6, 7)
    data[0] = 3 * data[0] + 2
    return data.to(dtype), random(4, C, 6, 7, seed=5).to(dtype)


@pytest.mark.parametrize("sizes", [(2, 2), (3, 1), (4, 0), (0, 1, 3)])
def test_parts_of_a_batch_equal_the_whole(sizes):
    data, head = sample()
    last = data.contiguous(memory_format=torch.channels_last), head.contiguous(memory_format=torch.channels_last)
    single, double, channels_last = whole_and_parts(sizes, sample(torch.float32), (data, head), last)
    assert set(double[0]) == {"out", "data", "b_gamma", "b_beta", "b_moving_mean", "b_moving_var"}
    for (whole, parts), tolerance in ((single, 1e-5), (double, 1e-10), (channels_last, 1e-10)):
        assert_equal(parts, whole, tolerance)


def test_a_large_mean_and_a_small_variance_stay_accurate():
    data = (1000 + 0.1 * random(4, C, 16, 16)).float()
    head = random(4, C, 16, 16, seed=5).float()
    exact = results(layer(), data.double(), head.double())
    [(_, parts)] = whole_and_parts((3, 1), (data, head))
    # a sum of squares in float32 would be wrong by 1000^2 * 2^-24 = 0.06, where the variance is 0.01
    old = layer().b_moving_var
    variance = (parts["b_moving_var"] - 0.75 * old) / 0.25
    torch.testing.assert_close(variance, (exact["b_moving_var"] - 0.75 * old) / 0.25, rtol=1e-3, atol=1e-6)
    # float32 rounds the mean by up to 2^-15, which is 3e-4 of the deviation 0.1
    for name, expected in exact.items():
        assert (parts[name] - expected).abs().max() <= 1e-3 * expected.abs().max(), name


def test_statistics_of_half_precision_data_are_full_precision():
    steps = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
    cases = [sample(dtype) for dtype in steps]
    found = whole_and_parts((3, 1), *cases)
    for (data, head), (_, parts), (dtype, step) in zip(cases, found, steps.items(), strict=True):
        exact = results(layer(), data.double(), head.double())
        assert parts["out"].dtype == parts["data"].dtype == dtype
        for name in ("b_moving_mean", "b_moving_var"):
            assert parts[name].dtype == torch.float32
            torch.testing.assert_close(parts[name].double(), exact[name], rtol=1e-6, atol=1e-6)
        for name in ("out", "data", "b_gamma", "b_beta"):
            assert (parts[name] - exact[name]).abs().max() <= 2 * step * exact[name].abs().max(), name


def test_a_fixed_gamma_counts_as_one():
    [(whole, parts)] = whole_and_parts((3, 1), sample(), fix_gamma=True)
    assert "b_gamma" not in whole
    assert_equal(parts, whole, 1e-10)


def frozen_input(rank, data):
    """Train gamma and beta on data that needs no gradient, as after a fixed convolution."""
    module = layer()
    out = module(x=data[rank])[0]
    (out * out).sum().backward()
    return module.b_gamma.grad


def test_data_without_gradient():
    data = random(4, C, 3, 3)
    ranks = run_in_processes(frozen_input, data.split((3, 1)))
    module = layer()
    out = module(x=data)[0]
    (out * out).sum().backward()
    torch.testing.assert_close(sum(ranks), module.b_gamma.grad, rtol=1e-10, atol=1e-10)


def no_image_anywhere(rank, data):
    module = layer()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    found = results(module, data, data)
    return all(torch.equal(found[name], before[name]) for name in before), found


def test_no_image_in_any_process():
    for unchanged, found in run_in_processes(no_image_anywhere, torch.zeros(0, C, 3, 3, dtype=torch.float64)):
        assert unchanged
        assert found["out"].shape == found["data"].shape == (0, C, 3, 3)
        assert not found["b_gamma"].any()
        assert not found["b_beta"].any()


def first_rank_alone(rank, data):
    """Call modules that do not train on rank 0 alone: this would hang if they waited for other ranks."""
    if rank > 0:
        return []
    modules = [layer().eval(), layer(use_global_stats=True)]
    return [module(x=data)[0].detach() for module in modules]


def test_moving_statistics_need_no_other_process():
    data = random(4, C, 3, 3)
    for out in run_in_processes(first_rank_alone, data)[0]:
        assert torch.equal(out, layer(op="BatchNorm").eval()(x=data)[0])


def group_of_one(rank, data, head):
    assert dist.get_world_size() == 1
    return results(layer(torch.float32), data, head)


def test_a_process_alone_computes_batch_norm_bit_for_bit():
    data, head = random(4, C, 6, 7).float(), random(4, C, 6, 7, seed=5).float()
    local = results(layer(torch.float32, op="BatchNorm"), data, head)
    for found in (results(layer(torch.float32), data, head), *run_in_processes(group_of_one, data, head, size=1)):
        for name, expected in local.items():
            assert torch.equal(found[name], expected), name


def local_statistics(rank, parts, heads):
    return results(layer(op="BatchNorm"), parts[rank], heads[rank])


def test_local_batch_norm_does_not_look_at_other_processes():
    data, head = random(4, C, 3, 3), random(4, C, 3, 3, seed=5)
    ranks = run_in_processes(local_statistics, data.split(2), head.split(2))
    for found, part, part_head in zip(ranks, data.split(2), head.split(2), strict=True):
        for name, expected in results(layer(op="BatchNorm"), part, part_head).items():
            assert torch.equal(found[name], expected)


@pytest.mark.parametrize("op", ["BatchNorm", "_contrib_SyncBatchNorm"])
@pytest.mark.parametrize("fix_gamma", [False, True])
def test_no_image_changes_no_statistics(op, fix_gamma):
    module = layer(op=op, fix_gamma=fix_gamma)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    data = torch.zeros(0, C, 3, 4, dtype=torch.float64)
    found = results(module, data, data)
    assert found["out"].shape == found["data"].shape == (0, C, 3, 4)
    assert found["b_beta"].tolist() == [0.0] * C
    assert fix_gamma or found["b_gamma"].tolist() == [0.0] * C
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
