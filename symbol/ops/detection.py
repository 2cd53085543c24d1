"""Anchors and candidates. N images, A anchors per cell, C classes, H, W."""

from __future__ import annotations

from symbol.attributes import Attr
from symbol.ops.row import Attrs, Op, Shape, Shapes
from symbol.ops.rules import expect_rank


def _gen_anchor_shapes(attrs: Attrs, ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    expect_rank(ins[0], 4, "cls_prob (N, A*C, H, W)")
    if ins[0] is None:
        return ins, outs
    if not attrs["scales"] or not attrs["ratios"]:
        raise ValueError(f"anchors need scales and ratios, got {attrs['scales']} and {attrs['ratios']}")
    count = ins[0][2] * ins[0][3] * len(attrs["scales"]) * len(attrs["ratios"])  # H*W*A
    return ins, [(count, 4)]


def _gen_proposal_retina_shapes(attrs: Attrs, ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    prob, num_anchors, top_n = ins[0], attrs["num_anchors"], attrs["rpn_pre_nms_top_n"]
    expect_rank(prob, 4, "cls_prob (N, A*C, H, W)")
    if prob is None:
        return ins, outs
    n, channels, h, w = prob
    if num_anchors < 1 or top_n < 1:
        raise ValueError(f"num_anchors {num_anchors} and rpn_pre_nms_top_n {top_n} must be at least 1")
    if channels % num_anchors:
        raise ValueError(f"cls_prob has {channels} channels, no multiple of num_anchors {num_anchors}")
    anchors: Shape = (h * w * num_anchors, 4)
    if attrs["batch_wise_anchor"]:
        anchors = (n, *anchors)
    classes = channels // num_anchors + 1 if attrs["output_one_hot"] else 1
    return [prob, (n, num_anchors * 4, h, w), (n, 3), anchors], [(n, top_n, 4), (n, top_n, classes)]


PLAIN_PROPOSAL = "plain deltas (anchor_mean 0, anchor_std 1), one-hot scores, one anchor set"


def is_plain_proposal(attrs: Attrs) -> bool:
    """Return whether a proposal decodes as PLAIN_PROPOSAL says, which is all that our back ends do."""
    plain_deltas = not any(attrs["anchor_mean"]) and set(attrs["anchor_std"]) <= {1.0}
    return plain_deltas and attrs["output_one_hot"] and not attrs["iou_loss"] and not attrs["batch_wise_anchor"]


ROWS = (
    Op(
        "_contrib_GenAnchor",
        ("cls_prob",),
        {
            "scales": Attr("floats", (4.0, 8.0, 16.0, 32.0)),
            "ratios": Attr("floats", (0.5, 1.0, 2.0)),
            "feature_stride": Attr("int", 16),
        },
        shapes=_gen_anchor_shapes,
        recompute=False,
    ),
    Op(
        "_contrib_GenProposalRetina",
        ("cls_prob", "bbox_pred", "im_info", "anchors"),
        {
            "num_anchors": Attr("int"),
            "rpn_pre_nms_top_n": Attr("int", 6000),
            "rpn_min_size": Attr("int", 16),  # read, never applied: the decoder has no size filter
            "feature_stride": Attr("int", 16),
            "thresh": Attr("float", 0.0),
            "anchor_mean": Attr("floats", (0.0, 0.0, 0.0, 0.0)),
            "anchor_std": Attr("floats", (1.0, 1.0, 1.0, 1.0)),
            "iou_loss": Attr("bool", False),
            "output_one_hot": Attr("bool", True),
            "batch_wise_anchor": Attr("bool", False),
            "workspace": Attr("int", 256),
        },
        outputs=("output", "scores"),
        shapes=_gen_proposal_retina_shapes,
        recompute=False,
    ),
)
