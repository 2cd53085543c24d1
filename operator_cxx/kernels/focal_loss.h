/* The arithmetic of focal loss (Lin et al. 2017, "Focal Loss for Dense Object Detection", equation 5).
 *
 * Both cases of the loss are sigmoid(z)^gamma softplus(z), where z is the logit towards the wrong answer: -logit at the
 * positive class, logit elsewhere.
 */
#pragma once

#include "dtype.h"
#include "vector_math.h"

namespace nk {

/* Return z of a logit, whose class is the positive one if label == positive. Ignored anchors, whose label is negative
 * or NaN, get a z at which loss and slope are exactly 0, whatever the logit is. */
template <class T>
NK_HD T wrong_logit(T logit, float label, float positive) {
  const T z = label == positive ? -logit : logit;
  return label >= 0 ? z : T(-1e4);
}

/* The loss of one logit and its slope. squared: gamma is 2, which needs no power function. NaN propagates. */
template <class T, bool squared>
struct FocalTerm {
  T gamma;      // rounded to T
  T gamma_low;  // the rest of gamma

  /* Return the loss at z and write its derivative by z to slope, given e = exp(-|z|). */
  NK_HD T operator()(T z, T e, T& slope) const {
    const T large = 1 / (1 + e);        // sigmoid(|z|)
    const T small = e * large;          // sigmoid(-|z|)
    const T s = z < 0 ? small : large;  // sigmoid(z)
    const T log1p = log1p_unit(e);
    const T softplus = (z > 0 ? z : T(0)) + log1p;
    // The slope is s^gamma (gamma (1 - s) softplus + s), with 1 - s computed without cancellation.
    if (squared) {
      const T power = s * s;
      const T product = large * small;  // s (1 - s)
      slope = s * multiply_add(gamma * product, softplus, power);
      return power * softplus;
    }
    const T power = power_of_sigmoid(z, log1p);
    const T other = z < 0 ? large : small;  // 1 - s
    slope = power * multiply_add(gamma * other, softplus, s);
    return power * softplus;
  }

 private:
  /* Return s^gamma as exp(gamma log s), with -log s = max(-z, 0) + log(1 + e). The rounding error of the exponent would
   * be the relative error of the power, 1e-6 at an exponent of 20, so the power is corrected to first order by it. */
  NK_HD T power_of_sigmoid(T z, T log1p) const {
    const T size = z < 0 ? (z < T(-1e4) ? T(1e4) : -z) : T(0);  // bounded, as 0 times infinity is not 0
    const T log = size + log1p;
    const T log_low = (size - log) + log1p;
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
