/* The arithmetic of non-maximum suppression: the order of the boxes, and how an overlap lowers a score. */
#pragma once

#include "box.h"
#include "vector_math.h"

namespace nk {

/* Smaller keys come first: by falling score, of equal ones by rising index. No score has the key kNoBox. */
constexpr uint64_t kNoBox = ~uint64_t{0};

NK_HD uint64_t order_key(float score, uint32_t index) {
  const uint32_t bits = bits_of(score + 0.0f);  // -0 becomes 0, which it equals
  const uint32_t rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~rising) << 32 | index;
}

NK_HD uint32_t index_of(uint64_t key) { return static_cast<uint32_t>(key); }

/* What the score of a box is multiplied by when another box of its class, of this IoU with it, is kept. A NaN overlap
 * lowers nothing. (Bodla et al. 2017, "Soft-NMS", equations 2 and 3.) */
struct LinearDecay {
  float thr;
  NK_HD float operator()(float iou) const { return iou > thr ? 1.0f - iou : 1.0f; }
};

struct GaussianDecay {
  float sigma;
  NK_HD float operator()(float iou) const { return iou == iou ? exp_minus(iou * iou / sigma) : 1.0f; }
};

constexpr float kOut = -INFINITY;  // the score of a box that is out: no limit lies below

/* The score after a box was kept; kOut at or below min_score, and for good: no decay is negative. NaN is out. */
template <class Decay>
NK_HD float decayed(const Decay& decay, float score, float iou, float min_score) {
  const float lowered = score * decay(iou);
  return lowered > min_score ? lowered : kOut;
}

}  // namespace nk
