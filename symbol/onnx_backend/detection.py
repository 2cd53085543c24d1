"""Anchors and candidates. N images, A anchors per cell, C classes, H x W cells, T = rpn_pre_nms_top_n boxes of a level,
K = min(T, A*C*H*W) of them candidates. Boxes are xyxy in input pixels with inclusive corners.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from operator_cxx.anchor import base_anchors, grid_anchors
from operator_cxx.reference.box import MAX_LOG_RATIO
from symbol.onnx_backend.registry import lowers
from symbol.onnx_backend.writer import Value, Writer
from symbol.ops.detection import PLAIN_PROPOSAL, is_plain_proposal


@lowers("_contrib_GenAnchor")
def gen_anchor(
    writer: Writer,
    cls_prob: Value,
    *,
    scales: tuple[float, ...],
    ratios: tuple[float, ...],
    feature_stride: int,
    **_: Any,
) -> str:
    """Return anchors (H*W*A, 4), A fastest, as a constant: the input size of an exported graph is fixed."""
    H, W = cls_prob.shape[2:]
    base = base_anchors(feature_stride, scales, ratios)
    return writer.constant(grid_anchors(H, W, feature_stride, base).numpy(), name=writer.scope)


@lowers(
    "_contrib_GenProposalRetina",
    refuses=lambda attrs: not is_plain_proposal(attrs),
    only=PLAIN_PROPOSAL,
)
def gen_proposal_retina(
    writer: Writer,
    cls_prob: Value,
    bbox_pred: Value,
    im_info: Value,
    anchors: Value,
    *,
    num_anchors: int,
    rpn_pre_nms_top_n: int,
    thresh: float,
    **_: Any,
) -> tuple[str, str]:
    """Return boxes (N, T, 4) and scores (N, T, C + 1), one class per row above 0; unused rows are 0.

    Rows are in descending order of score, equal scores in the order (A, C, H, W), which is that of TopK: of equal
    values it takes the lower index first.
    """
    channel, H, W = cls_prob.shape[1:]
    A, C, cells = num_anchors, channel // num_anchors, H * W
    K = min(rpn_pre_nms_top_n, channel * cells)
    zero = writer.constant(0)
    prob = writer.op("Reshape", cls_prob, writer.ints(-1, channel * cells))
    prob = writer.op("Where", writer.op("Greater", prob, writer.constant(thresh)), prob, zero)
    score, top = writer.ops("TopK", 2, prob, writer.ints(K), axis=1)  # (N, K)
    score = writer.op("Unsqueeze", score, writer.ints(2))  # (N, K, 1)
    valid = writer.op("Greater", score, zero)

    a = writer.op("Div", top, writer.ints(C * cells))
    c = writer.op("Mod", writer.op("Div", top, writer.ints(cells)), writer.ints(C))
    cell = writer.op("Mod", top, writer.ints(cells))
    row = writer.op("Add", writer.op("Mul", cell, writer.ints(A)), a)
    delta = writer.op("Reshape", bbox_pred, writer.ints(-1, A, 4, cells))
    delta = writer.op("Transpose", delta, perm=(0, 3, 1, 2))
    delta = writer.op("Reshape", delta, writer.ints(-1, cells * A, 4))
    index = writer.op("Tile", writer.op("Unsqueeze", row, writer.ints(2)), writer.ints(1, 1, 4))
    delta = writer.op("GatherElements", delta, index, axis=1)  # (N, K, 4)
    box = _decode(writer, writer.op("Gather", anchors, row, axis=0), delta)
    sides = writer.op("Gather", im_info, writer.ints(1, 0, 1, 0), axis=1)  # width, height, width, height
    limit = writer.op("Unsqueeze", writer.op("Sub", sides, writer.constant(1)), writer.ints(1))
    box = writer.op("Max", writer.op("Min", box, limit), zero)
    box = writer.op("Where", valid, box, zero)

    number = writer.op("Add", c, writer.ints(1))  # a row that is not valid has score 0 in whichever class
    number = writer.op("Unsqueeze", number, writer.ints(2))
    one_hot = writer.op("Equal", number, writer.constant(np.arange(C + 1), np.int64))  # (N, K, C + 1)
    scores = writer.op("Where", one_hot, score, zero)
    if rpn_pre_nms_top_n > K:
        pads = writer.ints(0, 0, 0, 0, rpn_pre_nms_top_n - K, 0)
        box, scores = writer.op("Pad", box, pads), writer.op("Pad", scores, pads)
    return box, scores


def _decode(writer: Writer, anchor: str, delta: str) -> str:
    """Return the boxes (N, K, 4) at deltas (N, K, 4) from anchors (N, K, 4), with dw and dh capped."""
    one, half, halves = writer.constant(1), writer.constant(0.5), writer.ints(2, 2)
    low, high = writer.ops("Split", 2, anchor, halves, axis=2)  # (N, K, 2) each
    size = writer.op("Add", writer.op("Sub", high, low), one)
    center = writer.op("Add", low, writer.op("Mul", half, writer.op("Sub", size, one)))
    shift, log_ratio = writer.ops("Split", 2, delta, halves, axis=2)
    center = writer.op("Add", writer.op("Mul", shift, size), center)
    ratio = writer.op("Exp", writer.op("Min", log_ratio, writer.constant(MAX_LOG_RATIO)))
    reach = writer.op("Mul", half, writer.op("Sub", writer.op("Mul", ratio, size), one))
    return writer.op("Concat", writer.op("Sub", center, reach), writer.op("Add", center, reach), axis=2)
