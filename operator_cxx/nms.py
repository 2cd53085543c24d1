"""Greedy non-maximum suppression per class, hard and soft, of a batch.

Shapes: N images, M boxes per image, D = max_det. Boxes are xyxy in input pixels.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from operator_cxx import library
from operator_cxx.reference import nms as reference

_METHODS = ("hard", "linear", "gaussian")  # in the order of their codes in necklace.h


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
    """Return the kept boxes of every image, best first: index (N, D) int64 and score (N, D).

    A box is suppressed if its IoU with a kept box of the same class and a higher score is above thr. Among equal scores
    the lower index comes first. Beyond the kept boxes, index is -1 and score is 0. A box is never kept if its score is
    NaN or not above min_score. A box with a NaN coordinate neither suppresses nor is suppressed. Class 0 is a class
    like any other. There are no gradients.

    Args:
        bbox: (N, M, 4) of any scale. score: (N, M) of a floating-point type. cls: (N, M) of an integer type. Types of
            bbox and score other than float32 are computed in plain torch.
        inclusive: corners are inclusive, so the width of a box is x2 - x1 + 1; else x2 - x1.

    Raises ValueError for inconsistent shapes or types and for invalid settings.
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
    """Return the kept boxes of every image, best first, by soft-NMS: index (N, D) int64 and score (N, D).

    Repeatedly, the box with the best score of all classes is kept, and the scores of the other boxes of its class are
    multiplied by a decay: method "linear" by 1 - IoU if the IoU is above thr, "gaussian" by exp(-IoU^2 / sigma). The
    decay of a NaN IoU is 1. A box is removed once its score is not above min_score. The scores returned are the lowered
    ones. The other arguments are those of `nms`.

    Source: Bodla et al. 2017, "Soft-NMS: Improving Object Detection With One Line of Code", arXiv:1704.04503,
    equations 2 and 3. All classes are processed together, so that max_det and min_score mean the same as in `nms`.
    """
    _check("soft_nms", bbox, score, cls, thr, max_det, min_score)
    if method not in _METHODS[1:] or not sigma > 0:
        raise ValueError(f"soft_nms: expected method linear or gaussian and sigma > 0, got {method} and {sigma}")
    return _op(bbox, score, cls, method, thr, sigma, min_score, max_det, inclusive)


# The plain torch fallback is inside the operator, because it depends on values, which tracers do not have.
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
        raise ValueError(f"nms: expected fewer than 2^31 boxes per image, got {M}")
    index, kept_score = _answer(score, max_det)
    kernels.run(
        "nms",
        bbox,  # the device
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
    """Return uninitialised index (N, D) and score (N, D)."""
    shape = (score.shape[0], max_det)
    return score.new_empty(shape, dtype=torch.int64), score.new_empty(shape)


def _check(operator: str, bbox: Tensor, score: Tensor, cls: Tensor, thr: float, max_det: int, min_score: float) -> None:
    """Raise ValueError unless shapes, types, devices and settings are consistent."""
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
