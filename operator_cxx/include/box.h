/* The arithmetic of axis-aligned boxes, which every operator and both libraries share.
 *
 * A box is xyxy in input pixels. With inclusive corners its width is x2 - x1 + 1. Overlaps are compared for equality,
 * with each other and with thresholds, so the order of the operations is part of the result: it is that of
 * reference/box.py, whose IoUs these are, bit for bit.
 */
#pragma once

#include "common.h"

namespace nk {

/* A predicted box is at most 1000 / 16 times as wide or high as its anchor, so that exp() cannot overflow. */
constexpr double kMaxLogRatio = 4.135166556742356;  // log(1000 / 16)

template <class T>
struct Box {
  T x1, y1, x2, y2;
};

/* The box whose x1, y1, x2, y2 lie at `four`. */
template <class T>
NK_HD Box<T> load_box(const T* four) {
  return {four[0], four[1], four[2], four[3]};
}

/* The lesser and the greater of two; the second where one is NaN. One instruction each, also in vectors. */
template <class T>
NK_HD T lesser(T a, T b) {
  return a < b ? a : b;
}

template <class T>
NK_HD T greater(T a, T b) {
  return a > b ? a : b;
}

/* offset: 1 for inclusive corners, 0 for exclusive, here and in iou. */
template <class T>
NK_HD T area(const Box<T>& box, T offset = T(1)) {
  return (box.x2 - box.x1 + offset) * (box.y2 - box.y1 + offset);
}

/* Intersection over union; the areas are those of area(). NaN where a coordinate is NaN: such a box's area is NaN. */
template <class T>
NK_HD T iou(const Box<T>& a, T area_a, const Box<T>& b, T area_b, T offset = T(1)) {
  const T width = greater(lesser(a.x2, b.x2) - greater(a.x1, b.x1) + offset, T(0));
  const T height = greater(lesser(a.y2, b.y2) - greater(a.y1, b.y1) + offset, T(0));
  const T inter = width * height;
  return inter / (area_a + area_b - inter);
}

/* The deltas dx, dy, dw, dh that take an anchor to a box, inclusive corners (Girshick et al. 2014, "Rich feature
 * hierarchies", appendix C). */
template <class T>
NK_HD void encode(const Box<T>& anchor, const Box<T>& box, T* delta) {
  const T anchor_w = anchor.x2 - anchor.x1 + T(1), anchor_h = anchor.y2 - anchor.y1 + T(1);
  const T w = box.x2 - box.x1 + T(1), h = box.y2 - box.y1 + T(1);
  const T anchor_x = anchor.x1 + T(0.5) * (anchor_w - T(1)), anchor_y = anchor.y1 + T(0.5) * (anchor_h - T(1));
  const T x = box.x1 + T(0.5) * (w - T(1)), y = box.y1 + T(0.5) * (h - T(1));
  delta[0] = (x - anchor_x) / anchor_w;
  delta[1] = (y - anchor_y) / anchor_h;
  delta[2] = std::log(w / anchor_w);
  delta[3] = std::log(h / anchor_h);
}

/* The ends of a side at a place and a log-ratio of size from an anchor's side; NaN where one of them is. */
template <class T>
NK_HD void decode_side(T first, T last, T place, T log_ratio, T& low, T& high) {
  const T anchor_size = last - first + T(1);
  const T center = place * anchor_size + (first + T(0.5) * (anchor_size - T(1)));
  const T capped = log_ratio > T(kMaxLogRatio) ? T(kMaxLogRatio) : log_ratio;
  const T half = T(0.5) * (std::exp(capped) * anchor_size - T(1));
  low = center - half;
  high = center + half;
}

/* The box at deltas dx, dy, dw, dh from an anchor: encode undone, with dw and dh capped at kMaxLogRatio. */
template <class T>
NK_HD Box<T> decode(const Box<T>& anchor, const T* delta) {
  Box<T> box;
  decode_side(anchor.x1, anchor.x2, delta[0], delta[2], box.x1, box.x2);
  decode_side(anchor.y1, anchor.y2, delta[1], delta[3], box.y1, box.y2);
  return box;
}

}  // namespace nk
