/* The addresses of a tensor's elements. */
#pragma once

#include "common.h"

namespace nk {

/* Strides in elements of a tensor [n, a, c, p]: image, anchor, channel or class, cell. */
struct Strides {
  int64_t n, a, c, p;

  /* From the strides [n, a, c, p] of the C interface. */
  static Strides of_anchors(const int64_t* stride) { return {stride[0], stride[1], stride[2], stride[3]}; }

  /* From the strides [n, c, p] of a map of channels, which counts as a single anchor. */
  static Strides of_channels(const int64_t* stride) { return {stride[0], 0, stride[1], stride[2]}; }

  /* Return the offset of [n, a, c, p] from the first element. */
  NK_HD int64_t offset(int64_t n_index, int64_t a_index, int64_t c_index, int64_t p_index) const {
    return n_index * n + a_index * a + c_index * c + p_index * p;
  }
};

}  // namespace nk
