"""Initial values of parameters: MXNet's initializers, by a variable's `__init__`, else by the ending of its name.

The text is MXNet's: a JSON list of a name and its arguments, e.g. '["normal", {"sigma": 0.01}]'. The random numbers
of a parameter depend only on the seed and its name, so adding a layer changes the initial values of no other.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from symbol.ops import Shape

# Glorot and Bengio 2010 (uniform, "avg") and He et al. 2015 (gaussian, "in", magnitude 2).
XAVIER = '["xavier", {"rnd_type": "uniform", "factor_type": "avg", "magnitude": 3}]'
MSRA = '["xavier", {"rnd_type": "gaussian", "factor_type": "in", "magnitude": 2}]'
ZERO = '["zero", {}]'


def normal(sigma: float) -> str:
    return json.dumps(["normal", {"sigma": sigma}])


def constant(value: float) -> str:
    return json.dumps(["constant", {"value": value}])


_BY_ENDING = (
    ("_weight", MSRA),
    ("_gamma", constant(1.0)),
    ("_moving_var", constant(1.0)),
    ("_beta", ZERO),
    ("_bias", ZERO),
    ("_moving_mean", ZERO),
)


def first_value(name: str, shape: Shape, init: str | None, seed: int) -> np.ndarray:
    """Return the initial value of a parameter, float32.

    Raises ValueError for an initializer that is unknown or malformed.
    """
    if init is None:
        init = next((text for ending, text in _BY_ENDING if name.endswith(ending)), None)
        if init is None:
            raise ValueError(f"parameter '{name}' has no initializer: give its variable one (init=...)")
    expected = f"parameter '{name}' {shape}: expected an initializer like {XAVIER}, got {init!r}"
    try:
        kind, arguments = json.loads(init)
        arguments = dict(arguments)
    except (ValueError, TypeError, RecursionError):
        raise ValueError(expected) from None
    rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
    fill = _FILLS.get(str(kind))
    if fill is None:
        raise ValueError(f"parameter '{name}': unknown initializer '{kind}'; known: {', '.join(_FILLS)}")
    arguments = {"value": float(kind == "one")} | arguments if fill is _constant else arguments
    try:
        return np.asarray(fill(rng, shape, **arguments), dtype=np.float32)
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{expected} ({error})") from None


def _constant(rng: np.random.Generator, shape: Shape, value: float) -> np.ndarray:
    return np.full(shape, value)


def _normal(rng: np.random.Generator, shape: Shape, sigma: float = 0.01) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32) * sigma


def _xavier(
    rng: np.random.Generator,
    shape: Shape,
    rnd_type: str = "uniform",
    factor_type: str = "avg",
    magnitude: Any = 3,
) -> np.ndarray:
    receptive = math.prod(shape[2:])
    fan_in, fan_out = shape[1] * receptive, shape[0] * receptive
    factor = {"avg": (fan_in + fan_out) / 2, "in": fan_in, "out": fan_out}[factor_type]
    scale = math.sqrt(float(magnitude) / factor)
    if rnd_type == "gaussian":
        return rng.standard_normal(shape, dtype=np.float32) * scale
    return rng.uniform(-scale, scale, shape)


_FILLS: Mapping[str, Callable[..., np.ndarray]] = {
    "zero": _constant,
    "one": _constant,
    "constant": _constant,
    "normal": _normal,
    "xavier": _xavier,
}
