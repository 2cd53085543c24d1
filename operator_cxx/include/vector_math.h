/* Elementary functions without branches or tables, which compilers vectorise.
 *
 * The polynomials are minimax approximations (Remez) of the relative error; the comments state the error over the
 * interval, which is below that of rounding. They are evaluated by Estrin's scheme, whose chain of dependent operations
 * is shorter than Horner's. float64 uses the C library, as training does not run in it.
 */
#pragma once

#include "common.h"

namespace nk {

NK_HD double multiply_add(double a, double b, double c) { return a * b + c; }

/* Return exp(-x) for x >= 0; 0 if it is below 2^-126. NaN propagates. */
NK_HD float exp_minus(float x) {
  // From 88 on, the power of two below is 2^-127, whose bit pattern is that of 0.
  x = 88.0f < x ? 88.0f : x;
  // n is -x / ln 2 rounded to an integer, as floats above 2^23 have no fraction. The lowest bits of `shifted` are those
  // of n + 127.
  constexpr float kShift = 0x1.8p23f + 127;
  const float shifted = multiply_add(x, -1.44269504f, kShift);
  const float n = shifted - kShift;
  // r = x + n ln 2, with |r| <= ln(2) / 2. ln 2 is split in two parts such that n times the first is exact.
  const float r = multiply_add(n, 0x1.7f7d1cp-20f, multiply_add(n, 0x1.62e4p-1f, x));
  // exp(-r) = 1 - r + r^2 q, error 3e-9
  const float r2 = r * r;
  const float high = multiply_add(r2, 1.38156891e-3f, multiply_add(r, -8.36850217e-3f, 4.16683473e-2f));
  const float q = multiply_add(r2, high, multiply_add(r, -1.66665229e-1f, 4.99999937e-1f));
  return multiply_add(r2, q, 1 - r) * float_of(bits_of(shifted) << 23);
}
NK_HD double exp_minus(double x) { return std::exp(-x); }

/* Return log(1 + e) for 0 <= e <= 1, with a small relative error. NaN propagates. */
NK_HD float log1p_unit(float e) {
  // e + e^2 q, error 4e-8
  const float e2 = e * e;
  const float e4 = e2 * e2;
  const float q01 = multiply_add(e, 0.333228892f, -0.499997244f);
  const float q23 = multiply_add(e, 0.191964502f, -0.248688201f);
  const float q45 = multiply_add(e, 0.0801743864f, -0.138399701f);
  const float q67 = multiply_add(e, 0.00550300752f, -0.0306384358f);
  const float q = multiply_add(e4, multiply_add(e2, q67, q45), multiply_add(e2, q23, q01));
  return multiply_add(e2, q, e);
}
NK_HD double log1p_unit(double e) { return std::log1p(e); }

/* Return the rounding error of product = a * b in float32 if the processor has fused multiply-add, else 0. */
NK_HD float product_error(float a, float b, float product) { return multiply_add(a, b, -product); }
NK_HD double product_error(double, double, double) { return 0; }

}  // namespace nk
