/* The element types of the C interface: 16-bit floats, conversion to and from the type of the arithmetic, dispatch. */
#pragma once

#include "common.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace nk {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

/* The type that elements of type T are computed in. */
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

NK_HD float widen(float x) { return x; }
NK_HD double widen(double x) { return x; }
NK_HD float widen(bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
NK_HD float widen(float16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  // Move exponent and mantissa to float32's positions; multiplying by 2^112 then corrects the exponent's bias, also for
  // subnormals. Infinity and NaN come out finite and get their exponent back.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;
  return float_of(scaled | special | (x.bits & 0x8000u) << 16);
#endif
}

/* Round to the type of `out`: to nearest, ties to even. */
NK_HD void narrow(float x, float& out) { out = x; }
NK_HD void narrow(double x, double& out) { out = x; }
NK_HD void narrow(float x, bfloat16& out) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
NK_HD void narrow(float x, float16& out) {
#ifdef __CUDA_ARCH__
  out.bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = bits_of(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: rebias the exponent (127 - 15) and round off 13 bits.
  const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  // Below 2^-14: adding 1/2 leaves the rounded multiple of 2^-24 in the lowest bits.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  out.bits = static_cast<uint16_t>((magnitude >= 0x477ff000u ? special : finite) | (bits >> 16 & 0x8000u));
#endif
}

template <class T>
constexpr int32_t kDtype = -1;
template <>
inline constexpr int32_t kDtype<float> = NK_FLOAT32;
template <>
inline constexpr int32_t kDtype<double> = NK_FLOAT64;
template <>
inline constexpr int32_t kDtype<float16> = NK_FLOAT16;
template <>
inline constexpr int32_t kDtype<bfloat16> = NK_BFLOAT16;

/* Call body with the template argument T that dtype is the code of; the operator supports T and Others:
 *
 *     with_dtype<float, double>(dtype, [&]<class T>() { run(static_cast<const T*>(input)); });
 */
template <class T, class... Others, class Body>
void with_dtype(int32_t dtype, const Body& body) {
  if (dtype == kDtype<T>) {
    body.template operator()<T>();
  } else if constexpr (sizeof...(Others) > 0) {
    with_dtype<Others...>(dtype, body);
  }
}

/* Call body with the template argument `value`: with_bool(gamma == 2, [&]<bool squared>() { ... }). */
template <class Body>
void with_bool(bool value, const Body& body) {
  if (value) {
    body.template operator()<true>();
  } else {
    body.template operator()<false>();
  }
}

}  // namespace nk
