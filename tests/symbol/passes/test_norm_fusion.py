"""The fused normalization and the cast weights, compared with plain torch. N images, C channels, H, W."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import symbol as S
from symbol import Group, lower, var
from symbol.passes import cast_weights, fuse_batch_norm, in_precision, without_gradient

SHAPE = (2, 3, 5, 6)


def ops(graph):
    return [node.op for node in graph.nodes() if not node.is_variable]


def conv(data, name, **attrs):
    return S.Convolution(data, num_filter=4, kernel=(3, 3), pad=(1, 1), name=name, **attrs)


def norm(data, name, **attrs):
    return S.BatchNorm(data, name=name, fix_gamma=False, momentum=0.75, eps=1e-3, **attrs)


def relu(data, name):
    return S.Activation(data, act_type="relu", name=name)


def block():
    """relu(norm(conv + bias) + relu(norm(conv + bias)))"""
    left = relu(norm(conv(var("data"), "c1"), "n1"), "r1")
    return relu(norm(conv(left, "c2"), "n2") + left, "r2")


def module(graph, dtype=torch.float64):
    """Return the lowered graph with distinct values in all tensors."""
    made = lower(graph, data=SHAPE).to(dtype).train()
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.randn(value.shape, generator=generator, dtype=dtype) for name, value in made.state_dict().items()
    }
    made.load_state_dict({name: value.abs() + 0.5 if name.endswith("var") else value for name, value in state.items()})
    return made


def random_data(dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(2), dtype=dtype)


def plain(state, data, training):
    """Compute `block` by torch.nn.functional, with the biases; also returns the moved statistics by name."""
    moved = {}

    def unit(data, i):
        x = F.conv2d(data, state[f"c{i}_weight"], state[f"c{i}_bias"], padding=1)
        mean, var_ = state[f"n{i}_moving_mean"], state[f"n{i}_moving_var"]
        if training:
            own = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            moved[f"n{i}_moving_mean"] = 0.75 * mean + 0.25 * own[0].detach()
            moved[f"n{i}_moving_var"] = 0.75 * var_ + 0.25 * own[1].detach()
            mean, var_ = own
        x = (x - mean.view(1, -1, 1, 1)) / (var_.view(1, -1, 1, 1) + 1e-3).sqrt()
        return x * state[f"n{i}_gamma"].view(1, -1, 1, 1) + state[f"n{i}_beta"].view(1, -1, 1, 1)

    left = unit(data, 1).relu()
    return (unit(left, 2) + left).relu(), moved


def test_neighbours_become_one_node():
    fused = fuse_batch_norm(block())
    assert ops(fused) == ["Convolution", "_batch_norm", "Convolution", "_batch_norm"]
    first, second = (node for node in fused.nodes() if node.op == "_batch_norm")
    assert (first.name, first.attrs["relu"], first.full_attrs()["no_residual"]) == ("r1", True, True)
    assert (second.name, second.attrs["relu"], second.full_attrs()["no_residual"]) == ("r2", True, False)
    assert without_gradient(fused) == {"c1_bias", "c2_bias"}
    assert set(fused.list_arguments()) == set(block().list_arguments())
    assert fused.list_inputs() == ["data"]


@pytest.mark.parametrize("training", [True, False])
def test_the_values_are_those_of_plain_torch(training):
    made = module(block()).train(training)
    state = {name: value.detach().clone().requires_grad_() for name, value in made.state_dict().items()}
    expected, moved = plain(state, random_data(), training)
    found = made(data=random_data())[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    head = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found.backward(head)
    expected.backward(head)
    for name, parameter in made.named_parameters():
        if training and name.endswith("bias"):
            assert parameter.grad is None
            assert state[name].grad.abs().max() < 1e-12  # of plain torch: rounding errors
        else:
            torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-9, atol=1e-11)
    for name, value in moved.items():
        torch.testing.assert_close(made.get_buffer(name), value.detach(), rtol=1e-12, atol=1e-12)
    assert len(moved) == (4 if training else 0)


def test_what_something_else_uses_is_left():
    data = conv(var("data"), "c")
    normalized = norm(data, "n")
    for graph in (
        Group([relu(normalized, "r"), normalized]),  # the normalization is an output
        Group([relu(normalized + normalized, "r")]),
        Group([relu(normalized, "r"), S.Activation(normalized, act_type="tanh", name="t")]),
    ):
        assert "Activation" in ops(fuse_batch_norm(graph))
    fused = fuse_batch_norm(Group([normalized, relu(data, "r")]))  # the convolution has two users: its bias stays
    assert without_gradient(fused) == set()


def test_moving_statistics_that_normalize_leave_the_bias_its_gradient():
    graph = norm(conv(var("data"), "c"), "n", use_global_stats=True)
    assert without_gradient(fuse_batch_norm(graph)) == set()
    made = module(graph)
    made(data=random_data())[0].sum().backward()
    assert made.c_bias.grad.abs().min() > 0


def test_a_bias_that_also_trains_elsewhere_keeps_its_gradient():
    bias = var("bias")
    data = var("data")
    one, two = (conv(data, name, bias=bias) for name in ("c", "d"))
    graph = Group([norm(one, "n"), two])
    assert without_gradient(fuse_batch_norm(graph)) == set()


def test_a_shared_weight_is_cast_once():
    weight = var("w_weight")
    data = var("data")
    half = S.Cast(data, dtype="float16")
    graph = Group([conv(half, "a", weight=weight), conv(half, "b", weight=weight), conv(data, "c")])
    bfloat16 = in_precision(graph, "bfloat16")
    casts = [node for node in cast_weights(bfloat16).nodes() if node.op == "_cast_weight"]
    assert [(node.inputs[0][0].name, node.attrs["dtype"]) for node in casts] == [("w_weight", "bfloat16")]
    assert ops(cast_weights(in_precision(graph, "float32"))) == ["Convolution"] * 3
    assert cast_weights(bfloat16).list_inputs() == ["data"]
    made = lower(bfloat16, data=SHAPE)
    a, b, c = made(data=random_data(torch.float32))
    assert (a.dtype, b.dtype, c.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    (a.float().sum() + b.float().sum()).backward()
    assert made.w_weight.grad.dtype == torch.float32
