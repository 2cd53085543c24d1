# cython: language_level=3
"""The operators on NumPy arrays, without torch: the same results as the functions of the same names on tensors.

The extension is linked to built/necklace_cpu.so; `make ops` builds both. Arrays are converted to the type and memory
order that the kernels require. `threads` is the number of threads, 0 for all CPUs that this process may use; the result
does not depend on it. The GIL is released during a call. Raises ValueError for invalid arguments, RuntimeError if a
kernel fails.

Shapes: N images, A anchors per cell, C foreground classes, H x W cells of a level, K anchors of all levels, G boxes per
image, M boxes, T = pre_nms_top_n candidates kept, D = max_det boxes kept, R = 4A rows of deltas, P cells of all levels.
Boxes are xyxy in input pixels with inclusive corners.
"""

import json
import math

import numpy as np

from libc.stdint cimport int32_t, int64_t, intptr_t

from operator_cxx.build import require_usable, source_hash, usable_cpus


cdef extern from "necklace.h" nogil:
    const char* nk_build_info()
    const char* nk_error_string(int32_t status)

    int64_t nk_focal_loss_workspace(int64_t N, int64_t A, int64_t P, int64_t C)
    int32_t nk_focal_loss(
        const void* logit, void* grad, int32_t dtype, int64_t N, int64_t A, int64_t P, int64_t C,
        const int64_t* stride, const int64_t* grad_stride, const float* label, int64_t label_stride,
        const double* scale, double alpha, double gamma, double* loss, void* workspace, intptr_t where)

    int64_t nk_smooth_l1_workspace(int64_t N, int64_t R, int64_t P)
    int32_t nk_smooth_l1(
        const void* delta, void* grad, int32_t dtype, int64_t N, int64_t R, int64_t P, const int64_t* stride,
        const int64_t* grad_stride, const void* target, const void* weight, const int64_t* target_stride,
        const double* scale, double beta, double* loss, void* workspace, intptr_t where)

    int64_t nk_retina_decode_workspace(int64_t N, int64_t A, int64_t C, int64_t P, int64_t T)
    int32_t nk_retina_decode(
        const void* prob, int32_t dtype, const int64_t* prob_stride, const void* delta, int32_t delta_dtype,
        const int64_t* delta_stride, const float* anchor, const float* im_info, int64_t N, int64_t A, int64_t C,
        int64_t P, int64_t T, float thresh, float* bbox, float* score, int64_t* cls, void* workspace, intptr_t where)

    int64_t nk_nms_workspace(int64_t N, int64_t M, int64_t D)
    int32_t nk_nms(
        const float* bbox, const float* score, const int64_t* cls, int64_t N, int64_t M, float offset, int32_t method,
        float thr, float sigma, float min_score, int64_t D, int64_t* index, float* kept_score, void* workspace,
        intptr_t where)

    int64_t nk_anchor_target_workspace(int64_t N, int64_t G, int64_t K)
    int32_t nk_anchor_target(
        const float* gt_bbox, const float* im_info, const float* anchor, int64_t N, int64_t G, int64_t K,
        float pos_thr, float neg_thr, float min_pos_thr, float allowed_border, float* label, float* delta,
        void* workspace, intptr_t where)

    int32_t nk_bbox_overlaps(
        const void* box, const void* other, int32_t dtype, int64_t M, int64_t G, void* iou, intptr_t where)

    int32_t NK_FLOAT32
    int32_t NK_FLOAT64
    int32_t NK_NMS_HARD
    int32_t NK_NMS_LINEAR
    int32_t NK_NMS_GAUSSIAN


cdef extern from *:
    const char* NK_SOURCES  # the hash of the sources that this extension was built from


def bbox_overlaps(box, other, *, threads=0):
    """Return the inclusive IoUs (M, G) of boxes (M, 4) with boxes (G, 4): float64 if one of them is, else float32."""
    box, other = np.asarray(box), np.asarray(other)
    if not _is_rows(box, 4) or not _is_rows(other, 4):
        raise ValueError(f"bbox_overlaps: expected box (M, 4) and other (G, 4), got {box.shape} and {other.shape}")
    dtype = _float_type(box, other)
    box, other = _as(dtype, box), _as(dtype, other)
    iou = np.empty((box.shape[0], other.shape[0]), dtype)
    cdef void* box_at = _address(box)
    cdef void* other_at = _address(other)
    cdef void* iou_at = _address(iou)
    cdef int64_t M = box.shape[0], G = other.shape[0]
    cdef int32_t code = _code(dtype), status
    cdef intptr_t where = _threads("bbox_overlaps", threads)
    with nogil:
        status = nk_bbox_overlaps(box_at, other_at, code, M, G, iou_at, where)
    _require_done("bbox_overlaps", status)
    return iou


def anchor_target(
    gt_bbox, im_info, anchors, *, double pos_thr, double neg_thr, double min_pos_thr, double allowed_border, threads=0
):
    """Return the class that each anchor is trained on, and the deltas to its box, as `pyramid_anchor_target` does.

    Args:
        gt_bbox: (N, G, 5) box and class from 1; rows whose class is below 1 are padding.
        im_info: (N, 3) height, width and scale of each image before padding.
        anchors: (K, 4).
        pos_thr, neg_thr: an anchor is foreground if its best IoU is at least pos_thr, background if below neg_thr.
        min_pos_thr: a box forces no anchor if its best IoU is below this, or zero.
        allowed_border: anchors that extend further than this beyond the image are ignored.

    Returns:
        label (N, K): -1 ignored, 0 background, else the class; delta (N, K, 4): dx, dy, dw, dh, zero where label < 1.
        Both are computed in float32.
    """
    gt_bbox, im_info, anchors = np.asarray(gt_bbox), np.asarray(im_info), np.asarray(anchors)
    if gt_bbox.ndim != 3 or gt_bbox.shape[2] != 5 or im_info.shape != (gt_bbox.shape[0], 3) or not _is_rows(anchors, 4):
        raise ValueError(
            "anchor_target: expected gt_bbox (N, G, 5), im_info (N, 3) and anchors (K, 4), "
            f"got {gt_bbox.shape}, {im_info.shape} and {anchors.shape}"
        )
    gt_bbox, im_info, anchors = _as(np.float32, gt_bbox), _as(np.float32, im_info), _as(np.float32, anchors)
    cdef int64_t N = gt_bbox.shape[0], G = gt_bbox.shape[1], K = anchors.shape[0]
    label, delta = np.empty((N, K), np.float32), np.empty((N, K, 4), np.float32)
    workspace = np.empty(nk_anchor_target_workspace(N, G, K), np.uint8)
    cdef float* gt_at = <float*>_address(gt_bbox)
    cdef float* im_info_at = <float*>_address(im_info)
    cdef float* anchor_at = <float*>_address(anchors)
    cdef float* label_at = <float*>_address(label)
    cdef float* delta_at = <float*>_address(delta)
    cdef void* workspace_at = _address(workspace)
    cdef intptr_t where = _threads("anchor_target", threads)
    cdef int32_t status
    with nogil:
        status = nk_anchor_target(
            gt_at, im_info_at, anchor_at, N, G, K, pos_thr, neg_thr, min_pos_thr, allowed_border, label_at, delta_at,
            workspace_at, where)
    _require_done("anchor_target", status)
    return label, delta


def nms(bbox, score, cls, *, double thr, max_det, double min_score=-math.inf, inclusive=True, threads=0):
    """Return the kept boxes of every image, best first: index (N, D) int64 and score (N, D) float32.

    A box is suppressed if its IoU with a kept box of the same class and a higher score is above thr. Among equal scores
    the lower index comes first. Beyond the kept boxes, index is -1 and score is 0. A box is never kept if its score is
    NaN or not above min_score.

    Args:
        bbox: (N, M, 4). score: (N, M). cls: (N, M) integers.
        inclusive: corners are inclusive, so the width of a box is x2 - x1 + 1; else x2 - x1.
    """
    return _nms("nms", bbox, score, cls, NK_NMS_HARD, thr, 1.0, min_score, max_det, inclusive, threads)


def soft_nms(
    bbox, score, cls, *, method, double thr, double sigma, double min_score, max_det, inclusive=True, threads=0
):
    """Return the kept boxes of every image by soft-NMS, where a kept box lowers the scores of its class.

    method "linear" multiplies a score by 1 - IoU if the IoU is above thr, "gaussian" by exp(-IoU^2 / sigma). A box is
    removed once its score is not above min_score. The scores returned are the lowered ones. Arrays are as in `nms`.

    Source: Bodla et al. 2017, "Soft-NMS: Improving Object Detection With One Line of Code", arXiv:1704.04503.
    """
    if method not in ("linear", "gaussian") or not sigma > 0:
        raise ValueError(f"soft_nms: expected method linear or gaussian and sigma > 0, got {method} and {sigma}")
    code = NK_NMS_LINEAR if method == "linear" else NK_NMS_GAUSSIAN
    return _nms("soft_nms", bbox, score, cls, code, thr, sigma, min_score, max_det, inclusive, threads)


cdef _nms(
    operator, bbox, score, cls, int32_t method, double thr, double sigma, double min_score, max_det, inclusive, threads
):
    bbox, score, cls = np.asarray(bbox), np.asarray(score), np.asarray(cls)
    if score.ndim != 2 or bbox.shape != (*score.shape, 4) or cls.shape != score.shape:
        raise ValueError(
            f"{operator}: expected bbox (N, M, 4), score (N, M) and cls (N, M), "
            f"got {bbox.shape}, {score.shape} and {cls.shape}"
        )
    if cls.size and cls.dtype.kind not in "iu":
        raise ValueError(f"{operator}: expected cls of an integer type, got {cls.dtype}")
    if not 0 <= thr <= 1 or max_det < 1 or math.isnan(min_score):
        raise ValueError(
            f"{operator}: expected thr of 0 to 1, max_det of at least 1 and a min_score, "
            f"got {thr}, {max_det} and {min_score}"
        )
    bbox, score, cls = _as(np.float32, bbox), _as(np.float32, score), _as(np.int64, cls)
    cdef int64_t N = score.shape[0], M = score.shape[1], D = max_det
    index, kept = np.empty((N, D), np.int64), np.empty((N, D), np.float32)
    workspace = np.empty(nk_nms_workspace(N, M, D), np.uint8)
    cdef float* bbox_at = <float*>_address(bbox)
    cdef float* score_at = <float*>_address(score)
    cdef int64_t* cls_at = <int64_t*>_address(cls)
    cdef int64_t* index_at = <int64_t*>_address(index)
    cdef float* kept_at = <float*>_address(kept)
    cdef void* workspace_at = _address(workspace)
    cdef float offset = bool(inclusive)
    cdef intptr_t where = _threads(operator, threads)
    cdef int32_t status
    with nogil:
        status = nk_nms(
            bbox_at, score_at, cls_at, N, M, offset, method, thr, sigma, min_score, D, index_at, kept_at, workspace_at,
            where)
    _require_done(operator, status)
    return index, kept


def retina_decode(
    cls_prob, bbox_pred, im_info, anchors, *, pre_nms_top_n, double thresh, num_anchors, threads=0
):
    """Return the best (anchor, class) pairs of one level and their boxes.

    Args:
        cls_prob: (N, A*C, H, W) probabilities, anchor-major, then class.
        bbox_pred: (N, 4A, H, W) deltas, anchor-major, then dx, dy, dw, dh.
        im_info: (N, 3) height, width and scale of each image before padding; boxes are clipped to it.
        anchors: (H*W*A, 4), ordered by row, column, anchor.
        pre_nms_top_n: T, the maximum number of pairs.
        thresh: candidates are pairs with a probability above this; at least 0. NaN is not a candidate.
        num_anchors: A.

    Returns:
        bbox (N, T, 4) and score (N, T) float32 and cls (N, T) int64 from 1, in descending order of score, equal scores
        in the order (A, C, H, W). Rows beyond the candidates are zero, including their class.
    """
    cls_prob, bbox_pred, im_info, anchors = map(np.asarray, (cls_prob, bbox_pred, im_info, anchors))
    _check_decode(cls_prob, bbox_pred, im_info, anchors, pre_nms_top_n, thresh, num_anchors)
    cls_prob, bbox_pred = _as(np.float32, cls_prob), _as(np.float32, bbox_pred)
    im_info, anchors = _as(np.float32, im_info), _as(np.float32, anchors)
    cdef int64_t A = num_anchors, T = pre_nms_top_n
    cdef int64_t N = cls_prob.shape[0], C = cls_prob.shape[1] // A, P = cls_prob.shape[2] * cls_prob.shape[3]
    cdef int64_t[3] prob_stride = [A * C * P, P, 1]
    cdef int64_t[3] delta_stride = [4 * A * P, P, 1]
    bbox, score, cls = np.empty((N, T, 4), np.float32), np.empty((N, T), np.float32), np.empty((N, T), np.int64)
    workspace = np.empty(nk_retina_decode_workspace(N, A, C, P, T), np.uint8)
    cdef void* prob_at = _address(cls_prob)
    cdef void* delta_at = _address(bbox_pred)
    cdef float* anchor_at = <float*>_address(anchors)
    cdef float* im_info_at = <float*>_address(im_info)
    cdef float* bbox_at = <float*>_address(bbox)
    cdef float* score_at = <float*>_address(score)
    cdef int64_t* cls_at = <int64_t*>_address(cls)
    cdef void* workspace_at = _address(workspace)
    cdef intptr_t where = _threads("retina_decode", threads)
    cdef int32_t status
    with nogil:
        status = nk_retina_decode(
            prob_at, NK_FLOAT32, prob_stride, delta_at, NK_FLOAT32, delta_stride, anchor_at, im_info_at, N, A, C, P, T,
            thresh, bbox_at, score_at, cls_at, workspace_at, where)
    _require_done("retina_decode", status)
    return bbox, score, cls


cdef _check_decode(cls_prob, bbox_pred, im_info, anchors, count, thresh, A):
    """Raise ValueError unless shapes and settings are consistent."""
    if A < 1 or cls_prob.ndim != 4 or cls_prob.shape[1] % A:
        raise ValueError(f"retina_decode: expected cls_prob (N, A*C, H, W) with A = {A}, got {cls_prob.shape}")
    N, channel, H, W = cls_prob.shape
    expected = {
        "bbox_pred": (bbox_pred, (N, 4 * A, H, W)), "im_info": (im_info, (N, 3)), "anchors": (anchors, (H * W * A, 4))
    }
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(f"retina_decode: expected {name} {shape}, got {array.shape}")
    if count < 1 or not thresh >= 0:
        raise ValueError(f"retina_decode: expected pre_nms_top_n >= 1 and thresh >= 0, got {count} and {thresh}")
    if channel * H * W >= 2**32:  # the index is the low half of a 64-bit key
        raise ValueError(f"retina_decode: expected fewer than 2^32 probabilities per image, got {cls_prob.shape}")


def focal_loss(logit, label, *, double alpha, double gamma, normalizer=None, with_grad=False, threads=0):
    """Return the focal loss of a batch, a float; with with_grad also its gradient: (loss, grad (N, K, C)).

    Args:
        logit: (N, K, C), computed in float64 if it is, else in float32.
        label: (N, K): -1 ignored, 0 background, 1..C foreground.
        normalizer: a scalar, or (N,) one per image, that divides the sum; None: the number of labels >= 1, plus 1.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", equation 5.
    """
    logit, label = np.asarray(logit), np.asarray(label)
    if logit.ndim != 3 or label.shape != logit.shape[:2]:
        raise ValueError(f"focal_loss: expected logit (N, K, C) and label (N, K), got {logit.shape} and {label.shape}")
    if not gamma >= 0:
        raise ValueError(f"focal_loss: expected gamma >= 0, got {gamma}")
    dtype = _float_type(logit)
    logit, label = _as(dtype, logit), _as(np.float32, label)
    cdef int64_t N = logit.shape[0], K = logit.shape[1], C = logit.shape[2]
    scale = _scale("focal_loss", np.sum(label >= 1) + 1 if normalizer is None else normalizer, N)
    grad = np.empty((N, K, C), dtype) if with_grad else None
    workspace = np.empty(nk_focal_loss_workspace(N, 1, K, C), np.uint8)
    cdef int64_t[4] stride = [K * C, 0, 1, C]
    cdef void* logit_at = _address(logit)
    cdef void* grad_at = _address(grad)
    cdef float* label_at = <float*>_address(label)
    cdef double* scale_at = <double*>_address(scale)
    cdef void* workspace_at = _address(workspace)
    cdef double loss = 0
    cdef int32_t code = _code(dtype), status
    cdef intptr_t where = _threads("focal_loss", threads)
    with nogil:
        status = nk_focal_loss(
            logit_at, grad_at, code, N, 1, K, C, stride, stride, label_at, K, scale_at, alpha, gamma, &loss,
            workspace_at, where)
    _require_done("focal_loss", status)
    return (loss, grad) if with_grad else loss


def smooth_l1_loss(delta, target, weight, *, double beta, normalizer=None, with_grad=False, threads=0):
    """Return the sum of weight * smooth_l1(delta - target); with with_grad also its gradient: (loss, grad (N, R, P)).

    smooth_l1(x) is x^2 / (2 beta) where |x| < beta, else |x| - beta / 2.

    Args:
        delta, target, weight: (N, R, P), computed in float64 if delta is, else in float32.
        normalizer: a scalar, or (N,) one per image, that divides the sum; None: 1.

    Source: Girshick 2015, "Fast R-CNN", equation 3.
    """
    delta, target, weight = np.asarray(delta), np.asarray(target), np.asarray(weight)
    if delta.ndim != 3 or not delta.shape == target.shape == weight.shape:
        raise ValueError(
            "smooth_l1_loss: expected delta, target and weight (N, R, P), "
            f"got {delta.shape}, {target.shape} and {weight.shape}"
        )
    if not beta > 0:
        raise ValueError(f"smooth_l1_loss: expected beta > 0, got {beta}")
    dtype = _float_type(delta)
    delta, target, weight = _as(dtype, delta), _as(dtype, target), _as(dtype, weight)
    cdef int64_t N = delta.shape[0], R = delta.shape[1], P = delta.shape[2]
    scale = _scale("smooth_l1_loss", 1 if normalizer is None else normalizer, N)
    grad = np.empty((N, R, P), dtype) if with_grad else None
    workspace = np.empty(nk_smooth_l1_workspace(N, R, P), np.uint8)
    cdef int64_t[3] stride = [R * P, P, 1]
    cdef void* delta_at = _address(delta)
    cdef void* grad_at = _address(grad)
    cdef void* target_at = _address(target)
    cdef void* weight_at = _address(weight)
    cdef double* scale_at = <double*>_address(scale)
    cdef void* workspace_at = _address(workspace)
    cdef double loss = 0
    cdef int32_t code = _code(dtype), status
    cdef intptr_t where = _threads("smooth_l1_loss", threads)
    with nogil:
        status = nk_smooth_l1(
            delta_at, grad_at, code, N, R, P, stride, stride, target_at, weight_at, stride, scale_at, beta, &loss,
            workspace_at, where)
    _require_done("smooth_l1_loss", status)
    return (loss, grad) if with_grad else loss


cdef bint _is_rows(array, width) except -1:
    return array.ndim == 2 and array.shape[1] == width


cdef _float_type(first, second=None):
    """Return float64 if an array is, else float32."""
    return np.float64 if np.float64 in (first.dtype, first.dtype if second is None else second.dtype) else np.float32


cdef int32_t _code(dtype) except -1:
    return NK_FLOAT64 if dtype is np.float64 else NK_FLOAT32


cdef _as(dtype, array):
    """Return the array as a contiguous one of the type, without a copy if it is one."""
    return np.ascontiguousarray(array, dtype)


cdef void* _address(array) except? NULL:
    """Return the address of the elements of an array; NULL for None. The caller keeps the array alive."""
    return NULL if array is None else <void*><size_t>array.ctypes.data


cdef _scale(operator, normalizer, N):
    """Return 1 / normalizer for every image: (N,) float64."""
    if np.shape(normalizer) not in ((), (N,)):
        raise ValueError(f"{operator}: expected normalizer () or ({N},), got {np.shape(normalizer)}")
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.ones(N) / np.asarray(normalizer, np.float64)


cdef intptr_t _threads(operator, threads) except -1:
    if threads < 0:
        raise ValueError(f"{operator}: expected threads >= 0, got {threads}")
    return threads or usable_cpus()


cdef _require_done(operator, int32_t status):
    if status:
        raise RuntimeError(f"{operator}: the kernel failed: {nk_error_string(status).decode()} ({status})")


cdef _require_usable():
    """Raise ImportError if this extension or its library was built from other sources or for another processor."""
    try:
        require_usable({"sources": NK_SOURCES.decode()}, "operator_cxx.numpy_ops")
        require_usable(json.loads(nk_build_info().decode()), "necklace_cpu.so")
    except ValueError as error:
        raise ImportError(str(error)) from error


_require_usable()
