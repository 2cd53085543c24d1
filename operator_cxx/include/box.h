/* Arithmetic of axis-aligned boxes, shared by all operators and both libraries.
 *
 * A box is xyxy in input pixels. With inclusive corners its width is x2 - x1 + 1. IoUs are compared for equality, with
 * each other and with thresholds, so the order of the operations is part of the result: it is the order of
 * reference/box.py, and the IoUs are equal to its own bit for bit.
 */
#pragma once

#include "common.h"

namespace nk {

/* Limit of dw and dh, so that exp() cannot overflow: a box is at most 1000 / 16 times the size of its anchor. */
constexpr double kMaxLogRatio = 4.135166556742356;  // log(1000 / 16)

template <class T>
struct Box {
  T x1, y1, x2, y2;
};

template <class T>
NK_HD Box<T> load_box(const T* xyxy) {
  return {xyxy[0], xyxy[1], xyxy[2], xyxy[3]};
}

/* Minimum and maximum; the second operand if one is NaN. A single instruction each, scalar or vector. */
template <class T>
NK_HD T lesser(T a, T b) {
  return a < b ? a : b;
}

template <class T>
NK_HD T greater(T a, T b) {
  return a > b ? a : b;
}

/* Return the area of a box. offset: 1 for inclusive corners, 0 for exclusive, here and in iou(). */
template <class T>
NK_HD T area(const Box<T>& box, T offset = T(1)) {
  return (box.x2 - box.x1 + offset) * (box.y2 - box.y1 + offset);
}

/* Return the intersection over union of two boxes, given their area(). NaN if a coordinate is NaN, as its area is. */
template <class T>
NK_HD T iou(const Box<T>& a, T area_a, const Box<T>& b, T area_b, T offset = T(1)) {
  const T width = greater(lesser(a.x2, b.x2) - greater(a.x1, b.x1) + offset, T(0));
  const T height = greater(lesser(a.y2, b.y2) - greater(a.y1, b.y1) + offset, T(0));
  const T inter = width * height;
  return inter / (area_a + area_b - inter);
}

/* Write the deltas dx, dy, dw, dh from an anchor to a box, with inclusive corners (Girshick et al. 2014, "Rich feature
 * hierarchies", appendix C). */
template <class T>
NK_HD void encode(const Box<T>& anchor, const Box<T>& box, T* delta) {
  const T anchor_w = anchor.x2 - anchor.x1 + T(1);
  const T anchor_h = anchor.y2 - anchor.y1 + T(1);
  const T anchor_x = anchor.x1 + T(0.5) * (anchor_w - T(1));
  const T anchor_y = anchor.y1 + T(0.5) * (anchor_h - T(1));
  const T w = box.x2 - box.x1 + T(1);
  const T h = box.y2 - box.y1 + T(1);
  const T x = box.x1 + T(0.5) * (w - T(1));
  const T y = box.y1 + T(0.5) * (h - T(1));
  delta[0] = (x - anchor_x) / anchor_w;
  delta[1] = (y - anchor_y) / anchor_h;
  delta[2] = std::log(w / anchor_w);
  delta[3] = std::log(h / anchor_h);
}

/* Decode one axis: write the ends of the side at a shift and a log-ratio of size from the anchor's. NaN propagates. */
template <class T>
NK_HD void decode_side(T first, T last, T shift, T log_ratio, T& low, T& high) {
  const T anchor_size = last - first + T(1);
  const T center = shift * anchor_size + (first + T(0.5) * (anchor_size - T(1)));
  const T capped = log_ratio > T(kMaxLogRatio) ? T(kMaxLogRatio) : log_ratio;
  const T half = T(0.5) * (std::exp(capped) * anchor_size - T(1));
  low = center - half;
  high = center + half;
}

/* Return the box at deltas dx, dy, dw, dh from an anchor. Inverts encode(), with dw and dh capped at kMaxLogRatio. */
template <class T>
NK_HD Box<T> decode(const Box<T>& anchor, const T* delta) {
  Box<T> box;
  decode_side(anchor.x1, anchor.x2, delta[0], delta[2], box.x1, box.x2);
  decode_side(anchor.y1, anchor.y2, delta[1], delta[3], box.y1, box.y2);
  return box;
}

}  // namespace nk
