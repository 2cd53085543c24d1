"""Decoding of one level: from the outputs of the head to the best boxes.

Shapes: N images, A anchors per cell, C foreground classes, H x W cells, T = pre_nms_top_n boxes kept.
Boxes are xyxy in input pixels with inclusive corners.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from operator_cxx.reference.box import decode_box

_LOW_BITS = 0xFFFFFFFF
_GROUP = 64  # neighbours that are represented by their maximum


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
    """Return `operator_cxx.retina_decode.retina_decode` for checked arguments."""
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
    """Return the `count` largest of the probabilities (N, P), all at least 0, and their indices, both (N, T').

    They are in descending order, equal ones by index; T' = min(count, P). The T' largest values lie in the T' groups of
    neighbours whose maxima come first in the same order, so only those groups are sorted.
    """
    N, P = prob.shape
    groups = -(-P // _GROUP)
    group = F.pad(prob, (0, groups * _GROUP - P)).reshape(N, groups, _GROUP)
    order = torch.arange(groups, device=prob.device)
    _, chosen = _ranked(group.amax(dim=2), order.expand(N, -1), count)
    value = group.gather(1, chosen[..., None].expand(-1, -1, _GROUP)).flatten(1)
    place = (chosen[..., None] * _GROUP + torch.arange(_GROUP, device=prob.device)).flatten(1)
    score, place = _ranked(value, place, count)
    return score, place.clamp(max=P - 1)  # the last group is padded with score 0


def _ranked(value: Tensor, place: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest of the float32 values (N, P) and their places, equal values by rising place.

    topk does not define the order of equal values, so it is given unique keys: the bit pattern of the value, which
    rises with a value >= 0, in the upper half and the complement of the place in the lower half.
    """
    key = (value.view(torch.int32).long() << 32) + (_LOW_BITS - place)
    key = key.topk(min(count, key.shape[1])).values
    return (key >> 32).int().view(torch.float32), _LOW_BITS - (key & _LOW_BITS)
