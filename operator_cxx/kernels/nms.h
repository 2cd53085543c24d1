/* The arithmetic of non-maximum suppression: the order of boxes and the decay of scores. */
#pragma once

#include "box.h"
#include "vector_math.h"

namespace nk {

/* Boxes with smaller keys come first: by falling score, equal scores by rising index. kNoBox is the key of no box. */
constexpr uint64_t kNoBox = ~uint64_t{0};

NK_HD uint64_t order_key(float score, uint32_t index) {
  const uint32_t bits = bits_of(score + 0.0f);  // turns -0 into 0, as they compare equal
  const uint32_t rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~rising) << 32 | index;
}

NK_HD uint32_t index_of(uint64_t key) { return static_cast<uint32_t>(key); }

/* The factor of a box's score when another box of its class with this IoU is kept: 1 if the IoU is NaN. (Bodla et al.
 * 2017, "Soft-NMS", equations 2 and 3.) */
struct LinearDecay {
  float thr;
  NK_HD float operator()(float iou) const { return iou > thr ? 1.0f - iou : 1.0f; }
};

struct GaussianDecay {
  float sigma;
  NK_HD float operator()(float iou) const { return iou == iou ? exp_minus(iou * iou / sigma) : 1.0f; }
};

constexpr float kRemoved = -INFINITY;  // the score of a removed box: not above any min_score

/* Return the score after another box was kept: kRemoved if it is not above min_score or NaN. Removed boxes stay
 * removed, because the factor is never negative. */
template <class Decay>
NK_HD float decayed(const Decay& decay, float score, float iou, float min_score) {
  const float lowered = score * decay(iou);
  return lowered > min_score ? lowered : kRemoved;
}

}  // namespace nk
