"""Anchors and candidates. N images, A anchors per cell, C classes, H, W. Boxes are xyxy in input pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from operator_cxx.anchor import base_anchors, grid_anchors
from operator_cxx.retina_decode import retina_decode
from symbol.ops.detection import PLAIN_PROPOSAL, is_plain_proposal
from symbol.torch_backend.registry import lowers


def _base_anchors(*, scales: tuple[float, ...], ratios: tuple[float, ...], feature_stride: int) -> Tensor:
    """Return the base anchors (A, 4) float64, a constant of the module: no batch copies them to the device."""
    return torch.from_numpy(base_anchors(feature_stride, scales, ratios))


@lowers("_contrib_GenAnchor", constant=_base_anchors)
def gen_anchor(cls_prob: Tensor, base: Tensor, *, feature_stride: int, **_: Any) -> Tensor:
    """Return anchors (H*W*A, 4), A fastest, for a map (N, A*C, H, W) from base anchors (A, 4) on its device."""
    return grid_anchors(cls_prob.shape[2], cls_prob.shape[3], feature_stride, base, cls_prob.device)


@lowers(
    "_contrib_GenProposalRetina",
    refuses=lambda attrs: not is_plain_proposal(attrs),
    only=PLAIN_PROPOSAL,
)
def gen_proposal_retina(
    cls_prob: Tensor,
    bbox_pred: Tensor,
    im_info: Tensor,
    anchors: Tensor,
    *,
    num_anchors: int,
    rpn_pre_nms_top_n: int,
    thresh: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Return boxes (N, top_n, 4) and scores (N, top_n, C + 1), one class per row above 0; unused rows are 0."""
    bbox, score, cls = retina_decode(
        cls_prob,
        bbox_pred,
        im_info,
        anchors,
        pre_nms_top_n=rpn_pre_nms_top_n,
        thresh=thresh,
        num_anchors=num_anchors,
    )
    num_class = cls_prob.shape[1] // num_anchors + 1
    one_hot = score.new_zeros(*score.shape, num_class).scatter(2, cls.unsqueeze(2), score.unsqueeze(2))
    return bbox, one_hot
