/* The C interface of the operators: pointers, sizes, and a stream or a number of threads.
 *
 * Two libraries implement it with the same arithmetic, necklace_cpu and necklace_cuda. They depend neither on torch nor
 * on NumPy or MXNet. library.py parses these declarations: one function per statement, only the types used here.
 *
 * Every function
 *   - takes `where` as its last argument: the number of threads (CPU library, at least 1), or a cudaStream_t of the
 *     current device (CUDA library), on which work is launched without waiting for it;
 *   - returns 0 or the cudaError_t of a launch, which nk_error_string describes;
 *   - does not check its arguments; bindings do. Sizes may be 0. Arrays are in the memory of the library's device, but
 *     strides are in host memory, in elements, and read before the function returns;
 *   - returns the same bits for any number of threads and has no state: it may be called concurrently;
 *   - uses `workspace` as scratch memory. Its size in bytes is given by nk_..._workspace, its alignment is 16.
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

/* Return JSON with the keys sources (a hash of the sources), compiler, flags, target and, on the CPU, features. */
NK_EXPORT const char* nk_build_info(void);

NK_EXPORT const char* nk_error_string(int32_t status);

/* Focal loss of one level (Lin et al. 2017, equation 5) and its gradient in the same pass.
 *
 * logit: dtype [n, a, c, p] at stride; for (N, K, C) logits A = 1 and P = K. label: float32, at n * label_stride +
 * a * P + p: -1 ignored, 0 background, 1..C foreground. scale: float64 (N), factors of the images' losses. The sum is
 * added to loss, a float64. grad: like logit, at grad_stride, set to d sum / d logit; or NULL, then grad_stride may be
 * NULL.
 */
NK_EXPORT int64_t nk_focal_loss_workspace(int64_t N, int64_t A, int64_t P, int64_t C);
NK_EXPORT int32_t nk_focal_loss(
    const void* logit, void* grad, int32_t dtype, int64_t N, int64_t A, int64_t P, int64_t C, const int64_t* stride,
    const int64_t* grad_stride, const float* label, int64_t label_stride, const double* scale, double alpha,
    double gamma, double* loss, void* workspace, intptr_t where);

/* Weighted smooth L1 of one level, quadratic where |delta - target| < beta, and its gradient in the same pass.
 *
 * delta: dtype [n, r, p] at stride, R = 4A rows. target, weight: float32 (float64 if dtype is), at
 * n * target_stride[0] + r * target_stride[1] + p. scale: float64 (N), factors of the images' losses. The sum of
 * scale * weight * smooth_l1 is added to loss, a float64. grad: like delta, at grad_stride, set to d sum / d delta; or
 * NULL, then grad_stride may be NULL.
 */
NK_EXPORT int64_t nk_smooth_l1_workspace(int64_t N, int64_t R, int64_t P);
NK_EXPORT int32_t nk_smooth_l1(
    const void* delta, void* grad, int32_t dtype, int64_t N, int64_t R, int64_t P, const int64_t* stride,
    const int64_t* grad_stride, const void* target, const void* weight, const int64_t* target_stride,
    const double* scale, double beta, double* loss, void* workspace, intptr_t where);

/* The T best (anchor, class) pairs of one level with a probability above thresh, and their boxes.
 *
 * prob: dtype [n, a * C + c, p] at prob_stride. delta: delta_dtype [n, 4 * a + (dx, dy, dw, dh), p] at delta_stride.
 * anchor: float32 (P, A, 4). im_info: float32 (N, 3) height, width, scale; boxes are clipped to it. Results in
 * descending order of probability, equal ones in the order (A, C, P): bbox float32 (N, T, 4), score float32 (N, T), cls
 * int64 (N, T) from 1; all zero beyond the candidates. dtype and delta_dtype are not NK_FLOAT64, thresh is at least 0,
 * and A * C * P is less than 2^32.
 */
NK_EXPORT int64_t nk_retina_decode_workspace(int64_t N, int64_t A, int64_t C, int64_t P, int64_t T);
NK_EXPORT int32_t nk_retina_decode(
    const void* prob, int32_t dtype, const int64_t* prob_stride, const void* delta, int32_t delta_dtype,
    const int64_t* delta_stride, const float* anchor, const float* im_info, int64_t N, int64_t A, int64_t C, int64_t P,
    int64_t T, float thresh, float* bbox, float* score, int64_t* cls, void* workspace, intptr_t where);

/* Greedy non-maximum suppression per class, hard or soft (Bodla et al. 2017), of every image.
 *
 * bbox: float32 (N, M, 4), M below 2^31. score: float32 (N, M); boxes with a score that is NaN or not above min_score
 * are removed. cls: int64 (N, M). offset: 1 for inclusive corners, 0 for exclusive. With an IoU above thr with a kept
 * box, method NK_NMS_HARD removes a box and NK_NMS_LINEAR multiplies its score by 1 - IoU; NK_NMS_GAUSSIAN multiplies
 * it by exp(-IoU^2 / sigma) at any IoU. Results in descending order of score, equal ones by index: index int64 (N, D),
 * -1 beyond the kept boxes; kept_score float32 (N, D), 0 beyond.
 */
NK_EXPORT int64_t nk_nms_workspace(int64_t N, int64_t M, int64_t D);
NK_EXPORT int32_t nk_nms(
    const float* bbox, const float* score, const int64_t* cls, int64_t N, int64_t M, float offset, int32_t method,
    float thr, float sigma, float min_score, int64_t D, int64_t* index, float* kept_score, void* workspace,
    intptr_t where);

/* The class that each anchor is trained on, and the deltas to its best box.
 *
 * gt_bbox: float32 (N, G, 5) box and class from 1; rows with a class below 1 are padding. im_info: float32 (N, 3)
 * height, width, scale. anchor: float32 (K, 4). label: float32 (N, K), -1 ignored, 0 background, else the class. delta:
 * float32 (N, K, 4) dx, dy, dw, dh, zero where label < 1.
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
