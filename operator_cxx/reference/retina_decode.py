"""From the head's outputs of one level to its best boxes, in plain torch.

Shapes: N images, A anchors per cell, C foreground classes, H x W cells, T = pre_nms_top_n boxes kept.
Boxes are xyxy in input pixels with inclusive corners.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from operator_cxx.reference.box import decode_box

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
    """`operator_cxx.retina_decode.retina_decode` of checked arguments. Boxes have bbox_pred's type or float32."""
    N, channel, H, W = cls_prob.shape
    A, C, cells = num_anchors, channel // num_anchors, H * W
    dtype = torch.promote_types(bbox_pred.dtype, torch.float32)
    prob = cls_prob.reshape(N, channel * cells).float()
    score, top = _top(torch.where(prob > thresh, prob, 0.0), pre_nms_top_n)  # (N, T') of A*C*H*W, T' <= T
    valid = score > 0

    a, c, cell = top // (C * cells), top // cells % C, top % cells
    row = cell * A + a  # (N, T')
    delta = bbox_pred.reshape(N, A, 4, cells).permute(0, 3, 1, 2).reshape(N, cells * A, 4)
    delta = delta.gather(1, row[..., None].expand(-1, -1, 4)).to(dtype)
    box = decode_box(anchors.to(dtype)[row], delta)  # (N, T', 4)
    limit = im_info[:, [1, 0, 1, 0]].to(dtype)[:, None] - 1  # (N, 1, 4)
    box = torch.minimum(box, limit).clamp(min=0)

    pad = pre_nms_top_n - top.shape[1]
    box = F.pad(torch.where(valid[..., None], box, 0.0), (0, 0, 0, pad))
    return box, F.pad(score, (0, pad)), F.pad(torch.where(valid, c + 1, 0), (0, pad))


def _top(prob: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of the probabilities (N, P), none below 0, and their places: both (N, T'), T' <= count.

    They fall, and of equal ones the lower place comes first. Any of the best T' values lies in one of the T' groups of
    neighbours whose own best values come first in the same order, so only those groups are searched.
    """
    N, P = prob.shape
    groups = -(-P // _GROUP)
    group = F.pad(prob, (0, groups * _GROUP - P)).reshape(N, groups, _GROUP)
    order = torch.arange(groups, device=prob.device)
    _, chosen = _ranked(group.amax(dim=2), order.expand(N, -1), count)
    value = group.gather(1, chosen[..., None].expand(-1, -1, _GROUP)).flatten(1)
    place = (chosen[..., None] * _GROUP + torch.arange(_GROUP, device=prob.device)).flatten(1)
    score, place = _ranked(value, place, count)
    return score, place.clamp(max=P - 1)  # padding of the last group, with score 0


def _ranked(value: Tensor, place: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of the float32 values (N, P) with their places, at most count, equal values by rising place.

    topk promises no order of equal values, so it is given unique keys: the bits of a float >= 0 sort like its value,
    and the place fills the low half.
    """
    key = (value.view(torch.int32).long() << 32) + (_LOW_BITS - place)
    key = key.topk(min(count, key.shape[1])).values
    return (key >> 32).int().view(torch.float32), _LOW_BITS - (key & _LOW_BITS)
