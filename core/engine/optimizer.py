"""Stochastic gradient descent with momentum, by MXNet's formula and MXNet's rule for weight decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def multipliers(
    attr_dict: Mapping[str, Mapping[str, str]], names: Iterable[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return (lr_mult, wd_mult) of every parameter.

    Weight decay applies to names that end in _weight or _gamma, unless `__lr_mult__` or `__wd_mult__` of the
    variable are set (MXNet's `Optimizer.set_wd_mult`).

    Args:
        attr_dict: attributes by variable name, as `Symbol.attr_dict()` gives them.
        names: the parameters that are trained.

    Raises:
        ValueError: an attribute that is not a number.
    """
    lr_mult, wd_mult = {}, {}
    for name in names:
        attributes = attr_dict.get(name, {})
        decays = name.endswith(("_weight", "_gamma"))
        lr_mult[name] = _number(name, attributes, "__lr_mult__", 1.0)
        wd_mult[name] = _number(name, attributes, "__wd_mult__", 1.0 if decays else 0.0)
    return lr_mult, wd_mult


def _number(name: str, attributes: Mapping[str, str], key: str, default: float) -> float:
    text = attributes.get(key)
    if text is None:
        return default
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"variable {name}: attribute {key} must be a number, got {text!r}") from None


def require_state(shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless `state` holds momentum for exactly the trained parameters, given by name and shape."""
    wrong = sorted(shapes.keys() ^ state.keys())
    wrong += [name for name, shape in shapes.items() if name in state and tuple(state[name].shape) != shape]
    if wrong:
        raise ValueError(
            f"the optimizer state does not fit this model: {len(wrong)} parameters differ, for example "
            f"{', '.join(wrong[:4])}. Resume with the config that the checkpoint was trained with, or "
            "start from its weights alone with --set ModelParam.init_from=<checkpoint>"
        )


class SGD:
    """SGD by MXNet's formula, with the learning rate inside the momentum: in torch.optim.SGD, which multiplies it
    afterwards, a drop of the rate also shrinks the updates accumulated in the momentum.

        mom = momentum * mom - lr * (clip(grad) + wd * weight);  weight += mom

    A parameter without a gradient is treated as one with gradient zero: it still decays.

    torch's fused kernel computes the formula in one pass over the memory, with the arguments lr = -1 and
    dampening = 1 + lr. The results of separate operations differ from it in the last bits, by the order of roundings.

    Args:
        named_parameters: the parameters that are trained; they are updated in place.
        lr_mult, wd_mult: factors on lr and wd by parameter name, from `multipliers`.
        clip_gradient: gradients are clipped elementwise to [-clip_gradient, clip_gradient] before the decay is
            added.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        lr_mult: Mapping[str, float],
        wd_mult: Mapping[str, float],
        *,
        momentum: float,
        wd: float,
        clip_gradient: float | None = None,
    ) -> None:
        self.momentum = momentum
        self.wd = wd
        self.clip_gradient = clip_gradient
        self._parameters = dict(named_parameters)
        self._momentum_buffers = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        self._zeros: dict[str, Tensor] = {}  # gradients of parameters without one
        # parameters with equal multipliers are updated together, by a few fused operations
        self._groups: dict[tuple[float, float], list[str]] = {}
        for name in self._parameters:
            self._groups.setdefault((lr_mult[name], wd_mult[name]), []).append(name)

    @torch.no_grad()
    def step(self, lr: float, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Update every parameter once from its `.grad`, which is strided like the parameter.

        grad_scale: the gradients are divided by it, float32 () on the parameters' device. Those in `.grad` may be
        divided too, or not: they are of no use after a step with a grad_scale.
        found_inf: a bool () on the parameters' device; where it is True, parameters and momentum keep their values.
        The host reads neither.
        """
        skip = None if found_inf is None else found_inf.float()
        for (lr_mult, wd_mult), names in self._groups.items():
            gradients, scale = [self._gradient(name) for name in names], grad_scale
            if self.clip_gradient is not None:
                if scale is not None:
                    torch._foreach_div_(gradients, scale)
                    scale = None
                gradients = list(torch._foreach_clamp_max(gradients, self.clip_gradient))
                torch._foreach_clamp_min_(gradients, -self.clip_gradient)
            torch._fused_sgd_(
                [self._parameters[name] for name in names],
                gradients,
                [self._momentum_buffers[name] for name in names],
                weight_decay=self.wd * wd_mult,
                momentum=self.momentum,
                lr=-1.0,
                dampening=1 + lr * lr_mult,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                grad_scale=scale,
                found_inf=skip,
            )

    def _gradient(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        if parameter.grad is not None:
            return parameter.grad
        if name not in self._zeros:
            self._zeros[name] = torch.zeros_like(parameter)
        return self._zeros[name]

    def zero_grad(self) -> None:
        """Set the gradients to None."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the momentum of every parameter, by the parameter's name."""
        return dict(self._momentum_buffers)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the momentum of a checkpoint.

        Raises:
            ValueError: parameters are missing, unknown or of another shape; nothing is loaded.
        """
        require_state({name: tuple(m.shape) for name, m in self._momentum_buffers.items()}, state)
        for name, buffer in self._momentum_buffers.items():
            buffer.copy_(state[name])
