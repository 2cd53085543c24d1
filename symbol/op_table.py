"""The vocabulary on one page: one row an operator, with MXNet 1.9's inputs, attributes and defaults.

Shape rules are in `symbol.shape_rules`, lowering to torch in `symbol.lowering`, both under the operator's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from symbol.attributes import DTYPES, REQUIRED, Attr, nearest

Shape = tuple[int, ...]  # 0 is an unknown dimension


@dataclass(frozen=True, slots=True)
class Op:
    """A row. `parameters` are the inputs that become variables where none is given; `auxiliary`, the last of them, are
    updated in the forward pass. A variadic operator takes `num_args` inputs arg0, arg1, ...
    """

    name: str
    inputs: tuple[str, ...] = ("data",)
    attrs: Mapping[str, Attr] | None = None
    parameters: tuple[str, ...] = ()
    auxiliary: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ("output",)
    visible: Callable[[Mapping[str, Any]], int] | None = None
    variadic: bool = False

    def input_names(self, attrs: Mapping[str, Any]) -> list[str]:
        """The inputs that a node with these (full) attributes has, in order."""
        if self.variadic:
            return [f"arg{index}" for index in range(attrs["num_args"])]
        return [name for name in self.inputs if not (name == "bias" and attrs["no_bias"])]

    def num_visible(self, attrs: Mapping[str, Any]) -> int:
        """How many outputs list_outputs shows; BatchNorm hides its statistics."""
        return self.visible(attrs) if self.visible else len(self.outputs)

    def defaults(self) -> dict[str, Any]:
        return {key: attr.default for key, attr in (self.attrs or {}).items() if attr.default is not REQUIRED}

    def parse(self, given: Mapping[str, Any], node: str) -> dict[str, Any]:
        """Typed attributes of a node. Raises ValueError naming the node, the attribute and what was expected."""
        table = self.attrs or {}
        typed = {}
        for key, value in given.items():
            if key not in table:
                known = nearest(key, table) or "none"
                raise ValueError(f"{self.name} '{node}': no attribute '{key}'; nearest: {known}")
            try:
                typed[key] = table[key].parse(value)
            except ValueError as error:
                raise ValueError(f"{self.name} '{node}': attribute '{key}': {error}") from None
        for key, attr in table.items():
            if attr.default is REQUIRED and key not in typed:
                raise ValueError(f"{self.name} '{node}': attribute '{key}' is missing; expected {attr.expected()}")
        if self.variadic and not 1 <= typed.get("num_args", 1) <= 1024:
            raise ValueError(f"{self.name} '{node}': num_args: expected 1 to 1024, got {typed['num_args']}")
        return typed


def _int(default: Any = REQUIRED) -> Attr:
    return Attr("int", default)


def _float(default: Any = REQUIRED) -> Attr:
    return Attr("float", default)


def _bool(default: bool) -> Attr:
    return Attr("bool", default)


def _ints(default: Any = REQUIRED) -> Attr:
    return Attr("ints", default)


def _floats(default: Any = REQUIRED) -> Attr:
    return Attr("floats", default)


def _enum(default: Any, *choices: str) -> Attr:
    return Attr("enum", default, choices)


_BATCH_NORM = {
    "eps": _float(1e-3),
    "momentum": _float(0.9),
    "fix_gamma": _bool(True),
    "use_global_stats": _bool(False),
    "output_mean_var": _bool(False),
}
_BATCH_NORM_ROW: dict[str, Any] = {
    "inputs": ("data", "gamma", "beta", "moving_mean", "moving_var"),
    "parameters": ("gamma", "beta", "moving_mean", "moving_var"),
    "auxiliary": ("moving_mean", "moving_var"),
    "outputs": ("output", "mean", "var"),
    "visible": lambda attrs: 3 if attrs["output_mean_var"] else 1,
}
_CUDNN = {"cudnn_off": _bool(False)}
_LOSS_NORMALIZATION = ("null", "batch", "valid")

_ROWS = (
    Op(
        "Convolution",
        ("data", "weight", "bias"),
        {
            "kernel": _ints(),
            "stride": _ints(()),
            "dilate": _ints(()),
            "pad": _ints(()),
            "num_filter": _int(),
            "num_group": _int(1),
            "workspace": _int(1024),
            "no_bias": _bool(False),
            "cudnn_tune": _enum(None, "fastest", "limited_workspace", "off"),
            "layout": _enum(None, "NCHW"),
            **_CUDNN,
        },
        parameters=("weight", "bias"),
    ),
    Op(
        "BatchNorm",
        attrs={
            **_BATCH_NORM,
            "axis": _int(1),
            "min_calib_range": _float(None),
            "max_calib_range": _float(None),
            **_CUDNN,
        },
        **_BATCH_NORM_ROW,
    ),
    Op(
        "_contrib_SyncBatchNorm",
        attrs={**_BATCH_NORM, "ndev": _int(1), "key": Attr("string")},
        **_BATCH_NORM_ROW,
    ),
    Op("Activation", attrs={"act_type": _enum(REQUIRED, "relu", "sigmoid", "tanh", "softrelu", "softsign")}),
    Op(
        "Pooling",
        attrs={
            "kernel": _ints(()),
            "pool_type": _enum("max", "max", "avg", "sum", "lp"),
            "global_pool": _bool(False),
            "pooling_convention": _enum("valid", "valid", "full", "same"),
            "stride": _ints(()),
            "pad": _ints(()),
            "p_value": _int(None),
            "count_include_pad": _enum(None, "True", "False"),
            "layout": _enum(None, "NCHW"),
            **_CUDNN,
        },
    ),
    Op(
        "UpSampling",
        attrs={
            "scale": _int(),
            "sample_type": _enum(REQUIRED, "nearest", "bilinear"),
            "num_args": _int(1),
            "num_filter": _int(0),
            "multi_input_mode": _enum("concat", "concat", "sum"),
            "workspace": _int(512),
        },
        variadic=True,
    ),
    Op("slice_like", ("data", "shape_like"), {"axes": _ints(())}),
    Op("slice_axis", attrs={"axis": _int(), "begin": _int(), "end": _int(None)}),
    Op("add_n", attrs={"num_args": _int(1)}, variadic=True),
    Op("elemwise_add", ("lhs", "rhs")),
    Op("elemwise_sub", ("lhs", "rhs")),
    Op("elemwise_mul", ("lhs", "rhs")),
    Op("broadcast_mul", ("lhs", "rhs")),
    Op("broadcast_div", ("lhs", "rhs")),
    Op("_mul_scalar", attrs={"scalar": _float(1.0), "is_int": _bool(True)}),
    Op("Reshape", attrs={"shape": _ints(), "reverse": _bool(False)}),
    Op("transpose", attrs={"axes": _ints(())}),
    Op("Concat", attrs={"num_args": _int(1), "dim": _int(1)}, variadic=True),
    Op("Cast", attrs={"dtype": _enum(REQUIRED, *DTYPES)}),
    Op("smooth_l1", attrs={"scalar": _float(1.0), "is_int": _bool(True)}),
    Op(
        "MakeLoss",
        attrs={
            "grad_scale": _float(1.0),
            "valid_thresh": _float(0.0),
            "normalization": _enum("null", *_LOSS_NORMALIZATION),
        },
    ),
    Op(
        "_contrib_FocalLoss",
        ("data", "label"),
        {
            "alpha": _float(0.25),
            "gamma": _float(2.0),
            "grad_scale": _float(1.0),
            "normalization": _enum("null", *_LOSS_NORMALIZATION),
            "out_grad": _bool(False),
            "workspace": _int(256),
        },
    ),
    Op("_contrib_BBoxNorm", ("data", "label"), {"normalization": _enum("valid", *_LOSS_NORMALIZATION)}),
    Op(
        "_contrib_GenAnchor",
        ("cls_prob",),
        {
            "scales": _floats((4.0, 8.0, 16.0, 32.0)),
            "ratios": _floats((0.5, 1.0, 2.0)),
            "feature_stride": _int(16),
        },
    ),
    Op(
        "_contrib_GenProposalRetina",
        ("cls_prob", "bbox_pred", "im_info", "anchors"),
        {
            "num_anchors": _int(),
            "rpn_pre_nms_top_n": _int(6000),
            "rpn_min_size": _int(16),  # read, never applied: the decoder has no size filter
            "feature_stride": _int(16),
            "thresh": _float(0.0),
            "anchor_mean": _floats((0.0, 0.0, 0.0, 0.0)),
            "anchor_std": _floats((1.0, 1.0, 1.0, 1.0)),
            "iou_loss": _bool(False),
            "output_one_hot": _bool(True),
            "batch_wise_anchor": _bool(False),
            "workspace": _int(256),
        },
        outputs=("output", "scores"),
    ),
    # Not MXNet's: passes put them in just before lowering, `passes.hoist_bbox_norm` the first and `fusion.fuse_losses`
    # the others, which read labels and then the map of every level.
    Op("_foreground_mean", ("data", "label")),
    Op(
        "_focal_loss_levels",
        attrs={
            "num_args": _int(1),
            "num_class": _int(),
            "alpha": _float(0.25),
            "gamma": _float(2.0),
            "grad_scale": _float(1.0),
            "normalization": _enum("null", *_LOSS_NORMALIZATION),
        },
        variadic=True,
    ),
    Op("_smooth_l1_levels", attrs={"num_args": _int(1), "scalar": _float(1.0)}, variadic=True),
)

OPS: Mapping[str, Op] = {row.name: row for row in _ROWS}

ALIASES: Mapping[str, str] = {
    "ElementWiseSum": "add_n",
    "_plus": "elemwise_add",
    "_add": "elemwise_add",
    "_minus": "elemwise_sub",
    "_sub": "elemwise_sub",
    "_mul": "elemwise_mul",
    "reshape": "Reshape",
    "concat": "Concat",
    "cast": "Cast",
}


def find_op(name: str) -> Op:
    """The row of an operator, by MXNet's name or an alias of it. Raises ValueError with the nearest names."""
    row = OPS.get(ALIASES.get(name, name))
    if row is None:
        raise ValueError(f"unknown operator '{name}'; nearest: {nearest(name, OPS)}")
    return row
