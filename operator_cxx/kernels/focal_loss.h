/* The arithmetic of focal loss (Lin et al. 2017, "Focal Loss for Dense Object Detection", equation 5).
 *
 * Both of its cases are one function of z, how far a logit leans to the wrong side: sigmoid(z)^gamma softplus(z).
 */
#pragma once

#include "vector_math.h"

namespace nk {

/* z of a logit whose class is the positive one where label == positive. Ignored anchors, of a label that is negative or
 * NaN, get a z whose term and slope are exactly 0, whatever their logit is. */
template <class T>
NK_HD T wrong_side(T logit, float label, float positive) {
  const T z = label == positive ? -logit : logit;
  return label >= 0 ? z : T(-1e4);
}

/* The term of z and its slope; squared: gamma is 2. NaN stays NaN. */
template <class T, bool squared>
struct FocalTerm {
  T gamma, gamma_low;  // gamma is their sum

  /* e = exp(-|z|) is made by the caller. The derivative by z goes to slope. */
  NK_HD T operator()(T z, T e, T& slope) const {
    const T large = 1 / (1 + e), small = e * large;  // sigmoid of |z| and of -|z|
    const T s = z < 0 ? small : large;               // sigmoid(z)
    const T log1p = log1p_unit(e);
    const T softplus = (z > 0 ? z : T(0)) + log1p;
    // The slope is s^gamma (gamma (1 - s) softplus + s); 1 - s is found without cancellation.
    if (squared) {
      const T power = s * s, product = large * small;  // s (1 - s)
      slope = s * multiply_add(gamma * product, softplus, power);
      return power * softplus;
    }
    const T power = power_of_sigmoid(z, log1p), other = z < 0 ? large : small;
    slope = power * multiply_add(gamma * other, softplus, s);
    return power * softplus;
  }

 private:
  /* exp(gamma log s) with -log s = max(-z, 0) + log(1 + e). An exponent of 20 is rounded by 1e-6, and that would be the
   * relative error of the power: it is corrected to first order by what the roundings took off. */
  NK_HD T power_of_sigmoid(T z, T log1p) const {
    const T size = z < 0 ? (z < T(-1e4) ? T(1e4) : -z) : T(0);  // bounded, as 0 times infinity is not 0
    const T log = size + log1p, log_low = (size - log) + log1p;
    const T exponent = gamma * log;
    const T low = product_error(gamma, log, exponent) + (gamma * log_low + gamma_low * log);
    const T power = exp_minus(exponent);
    return power - power * low;
  }
};

template <class T, bool squared>
FocalTerm<T, squared> focal_term(double gamma) {
  const T high = static_cast<T>(gamma);
  return {high, static_cast<T>(gamma - static_cast<double>(high))};
}

}  // namespace nk
