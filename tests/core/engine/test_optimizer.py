"""MXNet's SGD against the formula written out per element, and MXNet's rule for multipliers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from core.engine.optimizer import SGD, multipliers

ATTR_DICT = {
    "bn0_gamma": {"__wd_mult__": "0.0"},
    "cls_pred_bias": {"__wd_mult__": "1.0", "__lr_mult__": "2.0"},
    "conv0_weight": {"__init__": '["xavier", {}]'},
}
NAMES = ["conv0_weight", "bn0_gamma", "bn0_beta", "bn1_gamma", "cls_pred_bias", "bbox_pred_bias"]


def test_decay_applies_to_weight_and_gamma_unless_an_attribute_says_otherwise() -> None:
    lr_mult, wd_mult = multipliers(ATTR_DICT, NAMES)
    assert wd_mult == {
        "conv0_weight": 1.0,
        "bn0_gamma": 0.0,
        "bn0_beta": 0.0,
        "bn1_gamma": 1.0,
        "cls_pred_bias": 1.0,
        "bbox_pred_bias": 0.0,
    }
    assert lr_mult == {**dict.fromkeys(NAMES, 1.0), "cls_pred_bias": 2.0}


def test_an_attribute_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="variable a_weight: attribute __wd_mult__ must be a number, got 'none'"):
        multipliers({"a_weight": {"__wd_mult__": "none"}}, ["a_weight"])


def make_parameters(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, 2, generator=generator, dtype=torch.float64).requires_grad_() for name in NAMES}


def make_sgd(parameters: dict[str, torch.Tensor], clip_gradient: float | None = None) -> SGD:
    lr_mult, wd_mult = multipliers(ATTR_DICT, parameters)
    return SGD(parameters.items(), lr_mult, wd_mult, momentum=0.9, wd=0.01, clip_gradient=clip_gradient)


def set_gradients(parameters: dict[str, torch.Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("clip_gradient", [None, 0.5])
def test_three_steps_equal_the_formula(clip_gradient: float | None) -> None:
    parameters = make_parameters()
    sgd = make_sgd(parameters, clip_gradient)
    lr_mult, wd_mult = multipliers(ATTR_DICT, NAMES)
    weight = {name: p.detach().numpy().copy() for name, p in parameters.items()}
    momentum = {name: np.zeros((3, 2)) for name in NAMES}
    for step, lr in enumerate([0.1, 0.1, 0.01]):  # the rate drops, as at a milestone
        set_gradients(parameters, step)
        for name, p in parameters.items():
            g = p.grad.numpy()
            if clip_gradient is not None:
                g = np.minimum(np.maximum(g, -clip_gradient), clip_gradient)
            for index in np.ndindex(3, 2):
                decayed = g[index] + 0.01 * wd_mult[name] * weight[name][index]
                momentum[name][index] = 0.9 * momentum[name][index] - lr * lr_mult[name] * decayed
                weight[name][index] += momentum[name][index]
        sgd.step(lr)
    for name, p in parameters.items():
        np.testing.assert_allclose(p.detach().numpy(), weight[name], rtol=1e-12)
        np.testing.assert_allclose(sgd.state_dict()[name].numpy(), momentum[name], rtol=1e-12)


def test_a_step_leaves_the_gradients_as_they_are() -> None:
    parameters = make_parameters()
    set_gradients(parameters, 0)
    before = {name: p.grad.clone() for name, p in parameters.items()}
    make_sgd(parameters, clip_gradient=0.5).step(0.1)
    for name, p in parameters.items():
        torch.testing.assert_close(p.grad, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("clip_gradient", [None, 0.5])
def test_scaled_gradients_give_the_update_of_the_unscaled_ones(clip_gradient: float | None) -> None:
    states = []
    for scale in (1, 2**12):
        parameters = make_parameters()
        sgd = make_sgd(parameters, clip_gradient)
        for step in range(2):
            set_gradients(parameters, step)
            parameters["bn1_gamma"].grad = None
            for parameter in parameters.values():
                if parameter.grad is not None:
                    parameter.grad *= scale
            sgd.step(0.1, torch.tensor(float(scale)) if scale > 1 else None)
        states.append(
            {name: p.detach() for name, p in parameters.items()} | {f"{n}.m": m for n, m in sgd.state_dict().items()}
        )
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("clip_gradient", [None, 0.5])
def test_an_overflow_leaves_weights_and_momentum_as_they_are(clip_gradient: float | None) -> None:
    parameters = {name: p.detach().float().requires_grad_() for name, p in make_parameters().items()}
    sgd = make_sgd(parameters, clip_gradient)
    fine = torch.tensor(False)

    def step(found_inf: torch.Tensor, gradient: float) -> dict[str, torch.Tensor]:
        for name, parameter in parameters.items():
            parameter.grad = None if name == "bn1_gamma" else torch.full_like(parameter, gradient)
        sgd.step(0.1, torch.tensor(8.0), found_inf)
        return {name: p.detach().clone() for name, p in parameters.items()} | {
            f"{name} momentum": m.clone() for name, m in sgd.state_dict().items()
        }

    before = step(fine, 1.0)
    for gradient in (torch.inf, torch.nan):
        after = step(~fine, gradient)
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    after = step(fine, 1.0)
    assert not any(torch.equal(value, after[name]) for name, value in before.items())


def test_the_momentum_of_a_channels_last_weight_has_its_strides() -> None:
    """The fused kernel walks through the memory of weight, gradient and momentum alike."""
    plain = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = plain.clone(memory_format=layout).requires_grad_()
        sgd = SGD([("w", weight)], {"w": 1.0}, {"w": 1.0}, momentum=0.9, wd=0.01)
        sgd.load_state_dict({"w": plain.sqrt().nan_to_num(1.0)})
        (weight * plain).sum().backward()  # a gradient of the default layout, which autograd restrides
        sgd.step(0.1)
        ends.append(weight.detach())
    assert torch.equal(*ends)


def test_a_parameter_without_gradient_still_decays() -> None:
    parameters = make_parameters()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    make_sgd(parameters).step(0.1)
    # mom = -0.1 * 0.01 * w, so w shrinks by the factor 0.999; a bias stays
    torch.testing.assert_close(parameters["conv0_weight"].detach(), before["conv0_weight"] * 0.999)
    assert torch.equal(parameters["bn0_beta"], before["bn0_beta"])


def test_zero_grad_sets_gradients_to_none() -> None:
    parameters = make_parameters()
    set_gradients(parameters, 0)
    make_sgd(parameters).zero_grad()
    assert all(p.grad is None for p in parameters.values())


def test_a_resumed_run_continues_bit_for_bit() -> None:
    straight = make_parameters()
    sgd = make_sgd(straight)
    for step in range(4):
        set_gradients(straight, step)
        sgd.step(0.1)

    first = make_parameters()
    sgd = make_sgd(first)
    for step in range(2):
        set_gradients(first, step)
        sgd.step(0.1)
    second = {name: p.detach().clone().requires_grad_() for name, p in first.items()}
    resumed = make_sgd(second)
    resumed.load_state_dict({name: m.clone() for name, m in sgd.state_dict().items()})
    for step in range(2, 4):
        set_gradients(second, step)
        resumed.step(0.1)
    for name in NAMES:
        assert torch.equal(second[name], straight[name])


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape"])
def test_the_state_of_another_model_is_refused_and_nothing_is_loaded(fault: str) -> None:
    sgd = make_sgd(make_parameters())
    state = {name: torch.ones(3, 2, dtype=torch.float64) for name in NAMES}
    if fault == "missing":
        del state["bn1_gamma"]
    elif fault == "unknown":
        state["bn1_gamma_old"] = torch.ones(1)
    else:
        state["bn1_gamma"] = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="1 parameters differ, for example bn1_gamma"):
        sgd.load_state_dict(state)
    assert all(not buffer.any() for buffer in sgd.state_dict().values())
