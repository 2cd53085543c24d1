/* The arithmetic of nk_retina_decode: the order of candidates, their location in memory, and their boxes.
 *
 * A candidate is a probability above the threshold. Its place is its index in (A, C, P). Its key is the bit pattern of
 * the probability in the upper half and the complement of the place in the lower half, so that better candidates have
 * greater keys. Keys are unique, and no candidate has the key 0.
 */
#pragma once

#include "box.h"
#include "dtype.h"
#include "strides.h"

namespace nk {

/* Return the key of a probability above 0, whose bit pattern rises with its value. */
NK_HD uint64_t candidate_key(float prob, int64_t place) {
  return static_cast<uint64_t>(bits_of(prob)) << 32 | (0xffffffffu - static_cast<uint32_t>(place));
}

NK_HD float key_prob(uint64_t key) { return float_of(static_cast<uint32_t>(key >> 32)); }
NK_HD int64_t key_place(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

/* The order of memory of an image's probabilities, as lines of neighbours. Element i of line l lies at the offset
 * l * line_step + i * step and has the place l * line_place + i * place.
 *
 *     a map [row, p], cells side by side        lines are rows:        row 0:  p0 p1 p2 ...
 *     channels last, rows side by side          lines are cells:       cell 0: r0 r1 r2 ...
 *     a map without gaps between its rows       a single line:         r0p0 r0p1 ... r1p0 r1p1 ...
 */
struct Walk {
  int64_t lines, length;
  int64_t line_step, step;
  int64_t line_place, place;
};

/* Return the walk of probabilities [n, row, p], rows = A * C. */
inline Walk walk_of(int64_t rows, int64_t P, const Strides& at) {
  if (rows == 1 || at.c == P * at.p) return {1, rows * P, 0, at.p, 0, 1};
  if (P == 1 || at.c < at.p) return {P, rows, at.p, at.c, 1, P};
  return {rows, P, at.c, at.p, P, 1};
}

/* Clip x to [0, limit]; NaN if one of them is. */
NK_HD float clip(float x, float limit) {
  const float low = x < limit || x != x ? x : limit;
  return low > 0 || low != low ? low : 0.0f;
}

/* Decodes a key to a row of the result. D: type of the deltas. */
template <class D>
struct RowWriter {
  const D* delta;
  Strides at;  // of delta [n, 4 * a + (dx, dy, dw, dh), p]
  const float* anchor;
  const float* im_info;
  int64_t A, C, P;
  float* bbox;
  float* score;
  int64_t* cls;

  /* Write row `row` of the result, which belongs to image n; zeros for the key 0. */
  NK_HD void operator()(uint64_t key, int64_t n, int64_t row) const {
    Box<float> box{0, 0, 0, 0};
    int64_t c = -1;
    if (key != 0) {
      const int64_t place = key_place(key);
      const int64_t p = place % P;
      const int64_t a = place / P / C;
      c = place / P % C;
      const D* from = delta + at.offset(n, 0, 4 * a, p);
      const float four[4] = {widen(from[0]), widen(from[at.c]), widen(from[2 * at.c]), widen(from[3 * at.c])};
      box = decode(load_box(anchor + (p * A + a) * 4), four);
      const float bottom = im_info[n * 3] - 1;
      const float right = im_info[n * 3 + 1] - 1;
      box = {clip(box.x1, right), clip(box.y1, bottom), clip(box.x2, right), clip(box.y2, bottom)};
    }
    float* to = bbox + row * 4;
    to[0] = box.x1;
    to[1] = box.y1;
    to[2] = box.x2;
    to[3] = box.y2;
    score[row] = key_prob(key);
    cls[row] = c + 1;
  }
};

}  // namespace nk
