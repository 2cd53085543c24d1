/* The C interface of the operators: pointers, sizes, and where to work.
 *
 * Two libraries implement it, necklace_cpu and necklace_cuda, from the same arithmetic. Neither knows torch, NumPy or
 * MXNet. Library.py reads these declarations to call them: one function a statement, types as they stand here.
 *
 * Every function
 *   - takes `where` last: the CPU library the number of threads, at least 1; the CUDA library the cudaStream_t, of the
 *     current device, on which it only launches work and waits for nothing;
 *   - returns 0, or the cudaError_t that a launch gave; nk_error_string names it;
 *   - trusts its arguments: bindings check them. Sizes may be 0. Arrays live where the library works, but for strides,
 *     which are read before it returns, in elements;
 *   - gives the same bits for any number of threads, and keeps no state: it may be called from many threads at once;
 *   - uses `workspace`, of the bytes that its own nk_..._workspace says and aligned to 16, as scratch memory.
 *
 * Shapes: N images, A anchors per cell, P cells of a level (H * W), C foreground classes, K anchors of all levels,
 * G boxes per image, M candidates, T candidates kept, D detections kept. Boxes are xyxy in input pixels with inclusive
 * corners.
 */
#ifndef NECKLACE_H
#define NECKLACE_H

#include <stdint.h>

#if defined(__GNUC__)
#define NK_EXPORT __attribute__((visibility("default")))
#else
#define NK_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Codes of `dtype`. */
enum { NK_FLOAT32 = 0, NK_FLOAT64 = 1, NK_FLOAT16 = 2, NK_BFLOAT16 = 3 };

/* Codes of `method` of nk_nms. */
enum { NK_NMS_HARD = 0, NK_NMS_LINEAR = 1, NK_NMS_GAUSSIAN = 2 };

/* JSON: sources (a hash of operator_cxx's sources), compiler, flags, features. */
NK_EXPORT const char* nk_build_info(void);

NK_EXPORT const char* nk_error_string(int32_t status);

/* Focal loss of one level (Lin et al. 2017, equation 5), and in the same pass its gradient.
 *
 * logit: dtype, [n, a, c, p] at the sum of index * stride; (N, K, C) logits are A = 1, P = K. label: float32
 * [n * label_stride + a * P + p] of -1 ignored, 0 background, 1..C. scale: float64 (N), what the terms of each image are
 * multiplied by. Adds the sum to loss, one float64. grad: like logit at grad_stride, its elements set to d sum / d
 * logit; or NULL, and so may grad_stride.
 */
NK_EXPORT int64_t nk_focal_loss_workspace(int64_t N, int64_t A, int64_t P, int64_t C);
NK_EXPORT int32_t nk_focal_loss(
    const void* logit, void* grad, int32_t dtype, int64_t N, int64_t A, int64_t P, int64_t C, const int64_t* stride,
    const int64_t* grad_stride, const float* label, int64_t label_stride, const double* scale, double alpha,
    double gamma, double* loss, void* workspace, intptr_t where);

/* Weighted smooth L1 of one level, quadratic where |delta - target| < beta, and in the same pass its gradient.
 *
 * delta: dtype, [n, r, p] at the sum of index * stride, R = 4A rows. target, weight: float32 (float64 where dtype is), at
 * n * target_stride[0] + r * target_stride[1] + p. Adds the sum of scale[n] * weight * smooth_l1 to loss, one float64.
 * grad: like delta at grad_stride, its elements set; or NULL.
 */
NK_EXPORT int64_t nk_smooth_l1_workspace(int64_t N, int64_t R, int64_t P);
NK_EXPORT int32_t nk_smooth_l1(
    const void* delta, void* grad, int32_t dtype, int64_t N, int64_t R, int64_t P, const int64_t* stride,
    const int64_t* grad_stride, const void* target, const void* weight, const int64_t* target_stride,
    const double* scale, double beta, double* loss, void* workspace, intptr_t where);

/* The best T (anchor, class) pairs of one level whose probability is above thresh, and their boxes.
 *
 * prob: dtype, [n, a * C + c, p] at the sum of index * prob_stride. delta: delta_dtype, [n, 4 * a + (dx, dy, dw, dh), p]
 * at the sum of index * delta_stride. anchor: float32 [(p * A + a) * 4]. im_info: float32 (N, 3) height, width, scale;
 * boxes are clipped to it. By falling probability, of equal ones the lower place in (A, C, P) first: bbox float32
 * (N, T, 4), score float32 (N, T), cls int64 (N, T) from 1; all zero beyond the candidates. dtype and delta_dtype are not
 * NK_FLOAT64, thresh is at least 0, and A * C * P is less than 2^32.
 */
NK_EXPORT int64_t nk_retina_decode_workspace(int64_t N, int64_t A, int64_t C, int64_t P, int64_t T);
NK_EXPORT int32_t nk_retina_decode(
    const void* prob, int32_t dtype, const int64_t* prob_stride, const void* delta, int32_t delta_dtype,
    const int64_t* delta_stride, const float* anchor, const float* im_info, int64_t N, int64_t A, int64_t C, int64_t P,
    int64_t T, float thresh, float* bbox, float* score, int64_t* cls, void* workspace, intptr_t where);

/* Greedy non-maximum suppression per class, hard or soft (Bodla et al. 2017), of every image.
 *
 * bbox: float32 (N, M, 4), M below 2^31. score: float32 (N, M); boxes whose score is not above min_score (NaN is not)
 * are out. cls: int64 (N, M). offset: 1 for inclusive corners, 0 for exclusive. method NK_NMS_HARD: an IoU above thr
 * with a kept box removes; NK_NMS_LINEAR: it multiplies the score by 1 - IoU; NK_NMS_GAUSSIAN: every IoU multiplies it
 * by exp(-IoU^2 / sigma), thr is unused. By falling score, of equal ones the lower index first: index int64 (N, D),
 * -1 beyond the kept; kept_score float32 (N, D), 0 beyond.
 */
NK_EXPORT int64_t nk_nms_workspace(int64_t N, int64_t M, int64_t D);
NK_EXPORT int32_t nk_nms(
    const float* bbox, const float* score, const int64_t* cls, int64_t N, int64_t M, float offset, int32_t method,
    float thr, float sigma, float min_score, int64_t D, int64_t* index, float* kept_score, void* workspace,
    intptr_t where);

/* The class that each anchor is trained on, and the deltas to its best box.
 *
 * gt_bbox: float32 (N, G, 5) box and class from 1; rows of a class below 1 are padding. im_info: float32 (N, 3) height,
 * width, scale. anchor: float32 (K, 4). label: float32 (N, K), -1 ignored, 0 background, else the class. delta: float32
 * (N, K, 4) dx, dy, dw, dh, zero where label < 1.
 */
NK_EXPORT int64_t nk_anchor_target_workspace(int64_t N, int64_t G, int64_t K);
NK_EXPORT int32_t nk_anchor_target(
    const float* gt_bbox, const float* im_info, const float* anchor, int64_t N, int64_t G, int64_t K, float pos_thr,
    float neg_thr, float min_pos_thr, float allowed_border, float* label, float* delta, void* workspace,
    intptr_t where);

/* Inclusive IoU (M, G) of boxes (M, 4) with boxes (G, 4), all dtype NK_FLOAT32 or NK_FLOAT64. */
NK_EXPORT int32_t nk_bbox_overlaps(
    const void* box, const void* other, int32_t dtype, int64_t M, int64_t G, void* iou, intptr_t where);

#ifdef __cplusplus
}
#endif

#endif
