"""Layers for the models: short forms of the vocabulary with a detector's defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from symbol.graph import Symbol, create, current_prefix, var
from symbol.ops import Shape

Normalizer = Callable[..., Symbol]


def conv(
    data: Symbol,
    name: str,
    filter: int,
    kernel: int = 1,
    stride: int = 1,
    pad: int | None = None,
    no_bias: bool = True,
    weight: Symbol | None = None,
    bias: Symbol | None = None,
    init: str | None = None,
) -> Symbol:
    """Convolve; without `pad` the size stays, divided by stride. `init` initializes the weight."""
    if weight is None and init is not None:
        weight = var(f"{current_prefix()}{name}_weight", init=init)
    pad = kernel // 2 if pad is None else pad
    return create(
        "Convolution",
        data=data,
        weight=weight,
        bias=bias,
        name=name,
        num_filter=filter,
        kernel=(kernel, kernel),
        stride=(stride, stride),
        pad=(pad, pad),
        no_bias=no_bias,
    )


def relu(data: Symbol, name: str) -> Symbol:
    return create("Activation", data, name=name, act_type="relu")


def sigmoid(data: Symbol, name: str) -> Symbol:
    return create("Activation", data, name=name, act_type="sigmoid")


def max_pool(data: Symbol, name: str, kernel: int, stride: int, pad: int = 0) -> Symbol:
    return create(
        "Pooling",
        data,
        name=name,
        kernel=(kernel, kernel),
        stride=(stride, stride),
        pad=(pad, pad),
        pool_type="max",
    )


def upsample_like(data: Symbol, like: Symbol, name: str, scale: int) -> Symbol:
    """Upsample by `scale` (nearest neighbour) and cut to the size of `like`."""
    up = create("UpSampling", data, name=name, scale=scale, sample_type="nearest", num_args=1)
    return create("slice_like", up, like, name=f"{name}_clip")


def add_n(*terms: Symbol, name: str) -> Symbol:
    return create("add_n", *terms, name=name)


def reshape(data: Symbol, shape: Shape, name: str) -> Symbol:
    """Reshape with MXNet's codes; see `symbol.ops.layout.infer_reshape`."""
    return create("Reshape", data, shape=shape, name=name)


def concat(inputs: list[Symbol], dim: int, name: str) -> Symbol:
    return create("Concat", *inputs, dim=dim, name=name)


def cast(data: Symbol, dtype: Literal["float16", "float32"], name: str) -> Symbol:
    return create("Cast", data, dtype=dtype, name=name)


def normalizer_factory(
    type: Literal["localbn", "syncbn", "fixbn"],
    ndev: int = 1,
    wd_mult: float | None = None,
    momentum: float = 0.9,
    eps: float = 1e-5,
    lr_mult: float = 1.0,
) -> Normalizer:
    """Return a function (data, name) -> batch-normalized data.

    localbn: statistics per device; syncbn: statistics over all `ndev` devices; fixbn: the moving statistics, also in
    training. wd_mult and lr_mult apply to gamma and beta; momentum is that of the moving statistics; eps is added to
    the variance.
    """

    def local_bn(data: Symbol, name: str) -> Symbol:
        return create("BatchNorm", data, name=name, **common)

    def sync_bn(data: Symbol, name: str) -> Symbol:
        return create("_contrib_SyncBatchNorm", data, name=name, ndev=ndev, key=name, **common)

    def fix_bn(data: Symbol, name: str) -> Symbol:
        return create("BatchNorm", data, name=name, use_global_stats=True, **common)

    common: dict[str, Any] = {"eps": eps, "momentum": momentum, "fix_gamma": False, "wd_mult": wd_mult}
    if lr_mult != 1:  # the default of a variable
        common["lr_mult"] = lr_mult
    normalizers = {"localbn": local_bn, "syncbn": sync_bn, "fixbn": fix_bn}
    if type not in normalizers:
        raise ValueError(f"normalizer type: expected one of {', '.join(normalizers)}, got {type!r}")
    return normalizers[type]
