"""From the head's outputs of one level to its best boxes.

Shapes: N images, A anchors per cell, C foreground classes, H x W cells, T = pre_nms_top_n boxes kept.
Boxes are xyxy in input pixels with inclusive corners.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from operator_cxx.box import decode_box

_LOW_BITS = 0xFFFFFFFF
_GROUP = 64  # neighbours whose best probability stands for them


def retina_decode(
    cls_prob: Tensor,
    bbox_pred: Tensor,
    im_info: Tensor,
    anchors: Tensor,
    *,
    pre_nms_top_n: int,
    thresh: float,
    num_anchors: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best (anchor, class) pairs of one level and their boxes.

    Shapes of the answer do not depend on the values, so a graph with this operator can be traced.

    Args:
        cls_prob: (N, A*C, H, W) probabilities, anchor-major, then class. They are compared as float32.
        bbox_pred: (N, 4A, H, W) deltas, anchor-major, then dx, dy, dw, dh.
        im_info: (N, 3) height, width and scale of each image before padding; boxes are clipped to it.
        anchors: (H*W*A, 4) as `operator_cxx.anchor.grid_anchors` orders them.
        pre_nms_top_n: T, the most pairs kept.
        thresh: pairs whose probability is not above it are no candidates; at least 0.
        num_anchors: A.

    Returns:
        bbox (N, T, 4), score (N, T) and cls (N, T) int64 from 1, by falling score, equal scores by their
        place in (A, C, H, W). Rows beyond the candidates are zero, class 0 included.
    """
    _check(cls_prob, bbox_pred, im_info, anchors, pre_nms_top_n, thresh, num_anchors)
    N, _, H, W = cls_prob.shape
    A, C, cells = num_anchors, cls_prob.shape[1] // num_anchors, H * W
    dtype = torch.promote_types(bbox_pred.dtype, torch.float32)
    score, top = _top(cls_prob.reshape(N, -1).float(), pre_nms_top_n, thresh)  # (N, T') of A*C*H*W, T' <= T
    valid = score > 0

    a, c, cell = top // (C * cells), top // cells % C, top % cells
    row = cell * A + a  # (N, T')
    delta = bbox_pred.reshape(N, A, 4, cells).permute(0, 3, 1, 2).reshape(N, -1, 4)  # (N, H*W*A, 4)
    delta = delta.gather(1, row[..., None].expand(-1, -1, 4)).to(dtype)
    box = decode_box(anchors.to(dtype)[row], delta)  # (N, T', 4)
    limit = im_info[:, [1, 0, 1, 0]].to(dtype)[:, None] - 1  # (N, 1, 4)
    box = torch.minimum(box, limit).clamp(min=0)

    pad = pre_nms_top_n - top.shape[1]
    box = F.pad(torch.where(valid[..., None], box, 0.0), (0, 0, 0, pad))
    return box, F.pad(score, (0, pad)), F.pad(torch.where(valid, c + 1, 0), (0, pad))


def _top(prob: Tensor, count: int, thresh: float) -> tuple[Tensor, Tensor]:
    """The largest probabilities above thresh of each row (N, P), and their places: both (N, T'), T' <= count.

    They fall, and of equal ones the lower place comes first; where fewer are above thresh, zeros follow. Any of the
    best T' values lies in one of the T' groups of neighbours whose own best values come first in the same order, so
    only those groups are searched.
    """
    N, P = prob.shape
    group = F.pad(prob, (0, -P % _GROUP)).reshape(N, -1, _GROUP)  # (N, P / _GROUP, _GROUP)
    best = group.amax(dim=2)
    order = torch.arange(best.shape[1], device=prob.device)
    _, chosen = _ranked(best, order.expand(N, -1), count)
    value = group.gather(1, chosen[..., None].expand(-1, -1, _GROUP)).flatten(1)
    place = (chosen[..., None] * _GROUP + torch.arange(_GROUP, device=prob.device)).flatten(1)
    score, place = _ranked(torch.where(value > thresh, value, 0.0), place, count)
    return score, place.clamp(max=P - 1)  # padding of the last group, with score 0


def _ranked(value: Tensor, place: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of the float32 values (N, P) with their places, at most count, equal values by rising place.

    topk promises no order of equal values, so it is given unique keys: the bits of a float >= 0 sort like its value,
    and the place fills the low half.
    """
    key = (value.view(torch.int32).long() << 32) + (_LOW_BITS - place)
    key = key.topk(min(count, key.shape[1])).values
    return (key >> 32).int().view(torch.float32), _LOW_BITS - (key & _LOW_BITS)


def _check(
    cls_prob: Tensor,
    bbox_pred: Tensor,
    im_info: Tensor,
    anchors: Tensor,
    pre_nms_top_n: int,
    thresh: float,
    num_anchors: int,
) -> None:
    """Raise ValueError unless shapes and settings fit each other."""
    N, channel, H, W = cls_prob.shape
    if channel % num_anchors:
        raise ValueError(
            f"retina_decode: expected cls_prob (N, A*C, H, W) with A = {num_anchors}, got {tuple(cls_prob.shape)}"
        )
    expected = {
        "bbox_pred": (bbox_pred, (N, 4 * num_anchors, H, W)),
        "im_info": (im_info, (N, 3)),
        "anchors": (anchors, (H * W * num_anchors, 4)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"retina_decode: expected {name} {shape}, got {tuple(tensor.shape)}")
    if pre_nms_top_n < 1 or thresh < 0:
        raise ValueError(
            f"retina_decode: expected pre_nms_top_n >= 1 and thresh >= 0, got {pre_nms_top_n} and {thresh}"
        )
