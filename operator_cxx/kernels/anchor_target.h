/* The arithmetic of the anchor target: which anchor learns which box, as reference/anchor_target.py has it.
 *
 * NaN counts as there. A box with which one anchor's IoU is NaN forces none; an anchor whose IoU with one box is NaN
 * stays at its best box so far and is neither background nor foreground, unless another box forces it.
 */
#pragma once

#include "box.h"

namespace nk {

/* A row of gt_bbox. */
struct GroundTruth {
  Box<float> box;
  float area, cls;

  NK_HD explicit GroundTruth(const float* row) : box(load_box(row)), area(nk::area(box)), cls(row[4]) {}

  NK_HD bool is_padding() const { return !(cls >= 1); }
};

/* Are the sides above 0, they and the area finite? The IoU of two such boxes is 0 where they do not meet, never NaN. */
NK_HD bool is_regular(const Box<float>& box) {
  const float width = box.x2 - box.x1 + 1, height = box.y2 - box.y1 + 1;
  return (width > 0) & (height > 0) & (width * height < INFINITY);
}

/* Do the boxes share no pixel? With an extent of many boxes for one of the two: none of them does, since rounding keeps
 * the order of the widths. */
NK_HD bool are_apart(const Box<float>& a, const Box<float>& b) {
  const float width = lesser(a.x2, b.x2) - greater(a.x1, b.x1) + 1;
  const float height = lesser(a.y2, b.y2) - greater(a.y1, b.y1) + 1;
  return !(width > 0) | !(height > 0);
}

/* IoUs in an order of whole numbers: as they are, with NaN above all and -0 at 0. */
NK_HD uint32_t rank_of(float iou) { return bits_of(iou) & 0x7fffffffu; }

struct AnchorRule {
  float pos_thr, neg_thr, min_pos_thr, allowed_border;

  /* 1 where an anchor reaches at most allowed_border beyond the image, else 0; IoUs are multiplied by it. */
  NK_HD float inside(const Box<float>& anchor, float height, float width) const {
    const bool low = (anchor.x1 >= -allowed_border) & (anchor.y1 >= -allowed_border);
    return low & (anchor.x2 < width + allowed_border) & (anchor.y2 < height + allowed_border) ? 1.0f : 0.0f;
  }

  /* The IoU at which a box forces an anchor, from the rank of the box's best; where it forces none, infinity, which no
   * IoU is. */
  NK_HD float forcing_iou(uint32_t top) const {
    const float iou = float_of(top);
    return (iou > 0) & (iou >= min_pos_thr) ? iou : INFINITY;
  }

  /* From the rank of an anchor's best IoU, that box's class, and the class that boxes force or 0. */
  NK_HD float label(uint32_t best, float best_cls, float forced, float inside) const {
    const float iou = float_of(best);
    const float low = forced > 0 ? forced : (iou < neg_thr ? 0.0f : -1.0f);
    return inside > 0 ? (iou >= pos_thr ? best_cls : low) : -1.0f;
  }
};

/* What an anchor is after one more box g: the rank of its best IoU, its best box (the first of equals) and the class
 * forced on it (the last one's). */
NK_HD void visit_box(
    float iou, int32_t g, float cls, float forcing_iou, uint32_t& best, int32_t& best_box, float& forced) {
  const uint32_t rank = rank_of(iou);
  best_box = iou > float_of(best) ? g : best_box;
  best = rank > best ? rank : best;
  forced = iou == forcing_iou ? cls : forced;
}

}  // namespace nk
