"""Greedy non-maximum suppression per class, hard and soft, of a batch.

Shapes: N images, M boxes of an image, D = max_det boxes kept at most. Boxes are xyxy in input pixels.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from operator_cxx import library
from operator_cxx.reference import nms as reference

_METHODS = ("hard", "linear", "gaussian")  # by their codes in necklace.h


def nms(
    bbox: Tensor,
    score: Tensor,
    cls: Tensor,
    *,
    thr: float,
    max_det: int,
    min_score: float = -math.inf,
    inclusive: bool = True,
) -> tuple[Tensor, Tensor]:
    """The boxes of every image that no better box of their class covers: index (N, D) and score (N, D), best first.

    A box goes when its IoU with a kept box of its own class and of a higher score is above thr. Of equal scores the
    lower index comes first. index is int64, -1 beyond the boxes kept; score is 0 there. A box whose score is not above
    min_score (NaN is not) is never kept; one with a NaN coordinate removes none and none removes it. Boxes of every
    class are decided alike, class 0 too. Nothing is differentiated.

    Args:
        bbox: (N, M, 4), on any scale. score: (N, M), floating-point. cls: (N, M), integers. Where bbox and score are
            not float32, plain torch computes the answer.
        inclusive: corners lie inside the box, so its width is x2 - x1 + 1; else x2 - x1.

    Raises ValueError for shapes, types or settings that do not fit.
    """
    _check("nms", bbox, score, cls, thr, max_det, min_score)
    return _op(bbox, score, cls, "hard", thr, 1.0, min_score, max_det, inclusive)


def soft_nms(
    bbox: Tensor,
    score: Tensor,
    cls: Tensor,
    *,
    method: Literal["linear", "gaussian"],
    thr: float,
    sigma: float,
    min_score: float,
    max_det: int,
    inclusive: bool = True,
) -> tuple[Tensor, Tensor]:
    """The best boxes of every image, where a kept box lowers the scores of its class: index (N, D) and score (N, D).

    The box of the best score of all classes is kept, the score of every other box of its class is multiplied by what
    follows from their IoU, and so on. A box is out as soon as its score is not above min_score. method "linear"
    multiplies by 1 - IoU where the IoU is above thr, "gaussian" every score by exp(-IoU^2 / sigma). A NaN IoU lowers
    nothing. The scores returned are those lowered. All else is as in `nms`.

    Source: Bodla et al. 2017, "Soft-NMS: Improving Object Detection With One Line of Code", arXiv:1704.04503,
    equations 2 and 3; with classes side by side, so that max_det and min_score mean the same as in `nms`.
    """
    _check("soft_nms", bbox, score, cls, thr, max_det, min_score)
    if method not in _METHODS[1:] or not sigma > 0:
        raise ValueError(f"soft_nms: expected method linear or gaussian and sigma > 0, got {method} and {sigma}")
    return _op(bbox, score, cls, method, thr, sigma, min_score, max_det, inclusive)


# The plain torch answer is part of the operator, because it looks at its numbers, which a tracer cannot.
@torch.library.custom_op("necklace::nms", mutates_args=())
def _op(
    bbox: Tensor,
    score: Tensor,
    cls: Tensor,
    method: str,
    thr: float,
    sigma: float,
    min_score: float,
    max_det: int,
    inclusive: bool,
) -> tuple[Tensor, Tensor]:
    if not library.serves(bbox, torch.float32) or score.dtype != torch.float32:
        if method == "hard":
            return reference.nms(bbox, score, cls, thr=thr, max_det=max_det, min_score=min_score, offset=int(inclusive))
        decay = reference.linear_decay(thr) if method == "linear" else reference.gaussian_decay(sigma)
        return reference.soft_nms(
            bbox, score, cls, decay=decay, max_det=max_det, min_score=min_score, offset=int(inclusive)
        )
    kernels = library.loaded[bbox.device.type]
    N, M = score.shape
    if M >= 2**31:
        raise ValueError(f"nms: expected fewer than 2^31 boxes of an image, got {M}")
    index, kept_score = _answer(score, max_det)
    kernels.run(
        "nms",
        bbox,  # works where this is
        bbox.contiguous(),
        score.contiguous(),
        cls.to(torch.int64).contiguous(),
        N,
        M,
        float(inclusive),
        _METHODS.index(method),
        thr,
        sigma,
        min_score,
        max_det,
        index,
        kept_score,
        kernels.workspace("nms", bbox, N, M, max_det),
    )
    return index, kept_score


@_op.register_fake
def _(
    bbox: Tensor,
    score: Tensor,
    cls: Tensor,
    method: str,
    thr: float,
    sigma: float,
    min_score: float,
    max_det: int,
    inclusive: bool,
) -> tuple[Tensor, Tensor]:
    return _answer(score, max_det)


def _answer(score: Tensor, max_det: int) -> tuple[Tensor, Tensor]:
    """Uninitialised index (N, D) and score (N, D)."""
    shape = (score.shape[0], max_det)
    return score.new_empty(shape, dtype=torch.int64), score.new_empty(shape)


def _check(operator: str, bbox: Tensor, score: Tensor, cls: Tensor, thr: float, max_det: int, min_score: float) -> None:
    """Raise ValueError unless shapes, types, devices and settings fit each other."""
    if score.dim() != 2 or bbox.shape != (*score.shape, 4) or cls.shape != score.shape:
        raise ValueError(
            f"{operator}: expected bbox (N, M, 4), score (N, M) and cls (N, M), "
            f"got {tuple(bbox.shape)}, {tuple(score.shape)} and {tuple(cls.shape)}"
        )
    if not score.is_floating_point() or cls.is_floating_point() or cls.is_complex():
        raise ValueError(
            f"{operator}: expected score of a floating-point type and cls of an integer type, "
            f"got {score.dtype} and {cls.dtype}"
        )
    if not bbox.device == score.device == cls.device:
        raise ValueError(
            f"{operator}: expected bbox, score and cls on one device, "
            f"got {bbox.device}, {score.device} and {cls.device}"
        )
    if not 0 <= thr <= 1 or max_det < 1 or math.isnan(min_score):
        raise ValueError(
            f"{operator}: expected thr of 0 to 1, max_det of at least 1 and a min_score, "
            f"got {thr}, {max_det} and {min_score}"
        )
