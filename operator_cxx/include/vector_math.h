/* Elementary functions without branches or tables, for loops that a compiler turns into vector instructions.
 *
 * The polynomials have the least largest error (Remez), relative to the function over its whole interval; it stands
 * beside them. What rounding adds is larger. They are summed by halves, which takes fewer steps after each other than
 * Horner's rule. Of float64, which nobody trains in, the C library's functions are good enough.
 */
#pragma once

#include "common.h"

namespace nk {

NK_HD double multiply_add(double a, double b, double c) { return a * b + c; }

/* exp(-x) for x >= 0; 0 where that is below 2^-126. NaN stays NaN. */
NK_HD float exp_minus(float x) {
  // At 88 the power of two below becomes 2^-127, whose bits, all zero, are those of 0.
  x = 88.0f < x ? 88.0f : x;
  // n is the integer nearest to -x / ln 2: a number above 2^23 has no digits behind the point. The last bits of the sum
  // hold n + 127.
  constexpr float kShift = 0x1.8p23f + 127;
  const float shifted = multiply_add(x, -1.44269504f, kShift);
  const float n = shifted - kShift;
  // x + n ln 2, at most ln(2) / 2 from 0. ln 2 comes in two parts, n times the first is exact.
  const float r = multiply_add(n, 0x1.7f7d1cp-20f, multiply_add(n, 0x1.62e4p-1f, x));
  // exp(-r) = 1 - r + r^2 q, error 3e-9
  const float r2 = r * r;
  const float high = multiply_add(r2, 1.38156891e-3f, multiply_add(r, -8.36850217e-3f, 4.16683473e-2f));
  const float q = multiply_add(r2, high, multiply_add(r, -1.66665229e-1f, 4.99999937e-1f));
  return multiply_add(r2, q, 1 - r) * float_of(bits_of(shifted) << 23);
}
NK_HD double exp_minus(double x) { return std::exp(-x); }

/* log(1 + e) for 0 <= e <= 1, to a relative error. NaN stays NaN. */
NK_HD float log1p_unit(float e) {
  // e + e^2 q, error 4e-8
  const float e2 = e * e, e4 = e2 * e2;
  const float q01 = multiply_add(e, 0.333228892f, -0.499997244f), q23 = multiply_add(e, 0.191964502f, -0.248688201f);
  const float q45 = multiply_add(e, 0.0801743864f, -0.138399701f);
  const float q67 = multiply_add(e, 0.00550300752f, -0.0306384358f);
  const float q = multiply_add(e4, multiply_add(e2, q67, q45), multiply_add(e2, q23, q01));
  return multiply_add(e2, q, e);
}
NK_HD double log1p_unit(double e) { return std::log1p(e); }

/* What rounding took off product = a * b, for float32 where the machine can tell, else 0. */
NK_HD float product_error(float a, float b, float product) { return multiply_add(a, b, -product); }
NK_HD double product_error(double, double, double) { return 0; }

}  // namespace nk
