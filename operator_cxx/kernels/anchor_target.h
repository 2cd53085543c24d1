/* The arithmetic of anchor targets: the assignment of boxes to anchors, as in reference/anchor_target.py.
 *
 * NaN is handled as in the reference. A box forces no anchor if its IoU with any anchor is NaN. An anchor keeps the
 * best box found before a NaN IoU and is neither background nor foreground, unless another box forces it.
 */
#pragma once

#include "box.h"

namespace nk {

/* A row of gt_bbox. */
struct GroundTruth {
  Box<float> box;
  float area;
  float cls;

  NK_HD explicit GroundTruth(const float* row) : box(load_box(row)), area(nk::area(box)), cls(row[4]) {}

  NK_HD bool is_padding() const { return !(cls >= 1); }
};

/* Return true if the sides are positive and the area is finite. The IoU of two such boxes is never NaN, and 0
 * if they are apart. */
NK_HD bool is_regular(const Box<float>& box) {
  const float width = box.x2 - box.x1 + 1;
  const float height = box.y2 - box.y1 + 1;
  return (width > 0) & (height > 0) & (width * height < INFINITY);
}

/* Return true if the boxes share no pixel. One of them may be the extent of many boxes: if it shares no pixel, then
 * none of them does, because rounding is monotonic. */
NK_HD bool are_apart(const Box<float>& a, const Box<float>& b) {
  const float width = lesser(a.x2, b.x2) - greater(a.x1, b.x1) + 1;
  const float height = lesser(a.y2, b.y2) - greater(a.y1, b.y1) + 1;
  return !(width > 0) | !(height > 0);
}

/* Map IoUs to integers of the same order, with NaN above all others and -0 at 0. */
NK_HD uint32_t rank_of(float iou) { return bits_of(iou) & 0x7fffffffu; }

struct AnchorRule {
  float pos_thr, neg_thr, min_pos_thr, allowed_border;

  /* Return 1 if an anchor extends at most allowed_border beyond the image, else 0. IoUs are multiplied by it. */
  NK_HD float inside(const Box<float>& anchor, float height, float width) const {
    const bool low = (anchor.x1 >= -allowed_border) & (anchor.y1 >= -allowed_border);
    return low & (anchor.x2 < width + allowed_border) & (anchor.y2 < height + allowed_border) ? 1.0f : 0.0f;
  }

  /* Return the IoU at which a box forces an anchor, from the rank of the box's best IoU; infinity, which no IoU equals,
   * if it forces none. */
  NK_HD float forcing_iou(uint32_t top) const {
    const float iou = float_of(top);
    return (iou > 0) & (iou >= min_pos_thr) ? iou : INFINITY;
  }

  /* Return the label of an anchor from the rank of its best IoU, the class of that box, and the forced class or 0. */
  NK_HD float label(uint32_t best, float best_cls, float forced, float inside) const {
    const float iou = float_of(best);
    const float low = forced > 0 ? forced : (iou < neg_thr ? 0.0f : -1.0f);
    return inside > 0 ? (iou >= pos_thr ? best_cls : low) : -1.0f;
  }
};

/* Update an anchor for box g: the rank of its best IoU, its best box (the first of equals) and its forced class (by the
 * last box that forces it). */
NK_HD void visit_box(
    float iou, int32_t g, float cls, float forcing_iou, uint32_t& best, int32_t& best_box, float& forced) {
  const uint32_t rank = rank_of(iou);
  best_box = iou > float_of(best) ? g : best_box;
  best = rank > best ? rank : best;
  forced = iou == forcing_iou ? cls : forced;
}

}  // namespace nk
