/* The arithmetic of smooth L1 (Girshick 2015, "Fast R-CNN", equation 3, with the transition point beta). */
#pragma once

#include "dtype.h"

namespace nk {

template <class T>
struct SmoothL1 {
  T beta;

  /* Return the loss of a difference and write its derivative to slope. NaN propagates. */
  NK_HD T operator()(T difference, T& slope) const {
    const T size = difference < 0 ? -difference : difference;
    const bool quadratic = size < beta;
    slope = quadratic ? difference / beta : (difference < 0 ? T(-1) : difference > 0 ? T(1) : difference);
    return quadratic ? T(0.5) * difference * difference / beta : size - T(0.5) * beta;
  }
};

}  // namespace nk
