/* What both libraries share of nk_retina_decode: how candidates are ordered, where they lie, and their boxes.
 *
 * A candidate is a probability above the threshold. Its place is its index in (A, C, P); its key, the probability's
 * bits above the complement of the place, is greater the better it is. Keys differ, and 0 is none.
 */
#pragma once

#include "box.h"

namespace nk {

/* Of a probability above 0, whose bits rise with its value. */
NK_HD uint64_t candidate_key(float prob, int64_t place) {
  return static_cast<uint64_t>(bits_of(prob)) << 32 | (0xffffffffu - static_cast<uint32_t>(place));
}

NK_HD float key_prob(uint64_t key) { return float_of(static_cast<uint32_t>(key >> 32)); }
NK_HD int64_t key_place(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

/* An image's probabilities along memory: lines of neighbours. Element i of a line l is at l * line_step + i * step. */
struct Walk {
  int64_t lines, length;
  int64_t line_step, step;
  int64_t line_place, place;  // steps of the place
};

/* For probabilities [row, p] at row * row_step + p * cell_step. */
inline Walk walk_of(int64_t rows, int64_t P, int64_t row_step, int64_t cell_step) {
  if (rows == 1 || row_step == P * cell_step) return {1, rows * P, 0, cell_step, 0, 1};
  if (P == 1 || row_step < cell_step) return {P, rows, cell_step, row_step, 1, P};
  return {rows, P, row_step, cell_step, P, 1};
}

/* x within [0, limit]; NaN where one of them is. */
NK_HD float clip(float x, float limit) {
  const float low = x < limit || x != x ? x : limit;
  return low > 0 || low != low ? low : 0.0f;
}

/* From a key to a row of the answer. */
template <class D>
struct RowWriter {
  const D* delta;
  int64_t image_step, row_step, cell_step;
  const float* anchor;
  const float* im_info;
  int64_t A, C, P;
  float* bbox;
  float* score;
  int64_t* cls;

  /* Row `row` of the answer, of image n. */
  NK_HD void operator()(uint64_t key, int64_t n, int64_t row) const {
    Box<float> box{0, 0, 0, 0};
    int64_t c = -1;
    if (key != 0) {
      const int64_t place = key_place(key), p = place % P, a = place / P / C;
      c = place / P % C;
      const D* from = delta + n * image_step + 4 * a * row_step + p * cell_step;
      const float four[4] = {
          widen(from[0]), widen(from[row_step]), widen(from[2 * row_step]), widen(from[3 * row_step])};
      box = decode(load_box(anchor + (p * A + a) * 4), four);
      const float bottom = im_info[n * 3] - 1, right = im_info[n * 3 + 1] - 1;
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
