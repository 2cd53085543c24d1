"""Types of the compiled extension; the docstrings are in numpy_ops.pyx."""

from typing import Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

def bbox_overlaps(box: ArrayLike, other: ArrayLike, *, threads: int = 0) -> NDArray[np.floating]: ...
def anchor_target(
    gt_bbox: ArrayLike,
    im_info: ArrayLike,
    anchors: ArrayLike,
    *,
    pos_thr: float,
    neg_thr: float,
    min_pos_thr: float,
    allowed_border: float,
    threads: int = 0,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...
def nms(
    bbox: ArrayLike,
    score: ArrayLike,
    cls: ArrayLike,
    *,
    thr: float,
    max_det: int,
    min_score: float = ...,
    inclusive: bool = True,
    threads: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]: ...
def soft_nms(
    bbox: ArrayLike,
    score: ArrayLike,
    cls: ArrayLike,
    *,
    method: Literal["linear", "gaussian"],
    thr: float,
    sigma: float,
    min_score: float,
    max_det: int,
    inclusive: bool = True,
    threads: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]: ...
def retina_decode(
    cls_prob: ArrayLike,
    bbox_pred: ArrayLike,
    im_info: ArrayLike,
    anchors: ArrayLike,
    *,
    pre_nms_top_n: int,
    thresh: float,
    num_anchors: int,
    threads: int = 0,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]: ...
@overload
def focal_loss(
    logit: ArrayLike,
    label: ArrayLike,
    *,
    alpha: float,
    gamma: float,
    normalizer: ArrayLike | None = None,
    with_grad: Literal[False] = False,
    threads: int = 0,
) -> float: ...
@overload
def focal_loss(
    logit: ArrayLike,
    label: ArrayLike,
    *,
    alpha: float,
    gamma: float,
    normalizer: ArrayLike | None = None,
    with_grad: Literal[True],
    threads: int = 0,
) -> tuple[float, NDArray[np.floating]]: ...
@overload
def smooth_l1_loss(
    delta: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike,
    *,
    beta: float,
    normalizer: ArrayLike | None = None,
    with_grad: Literal[False] = False,
    threads: int = 0,
) -> float: ...
@overload
def smooth_l1_loss(
    delta: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike,
    *,
    beta: float,
    normalizer: ArrayLike | None = None,
    with_grad: Literal[True],
    threads: int = 0,
) -> tuple[float, NDArray[np.floating]]: ...
