/* What the kernels of both libraries share: functions for host and device, and the floating-point types. */
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "necklace.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define NK_HD __host__ __device__ __forceinline__
#else
#define NK_HD inline __attribute__((always_inline))
#endif

namespace nk {

NK_HD uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

NK_HD float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

/* a * b + c in one rounding where the machine has the instruction. The compilers are told to fuse nothing by themselves:
 * overlaps that are equal in one binding must be equal in all. */
NK_HD float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

NK_HD float widen(float x) { return x; }
NK_HD double widen(double x) { return x; }
NK_HD float widen(bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
NK_HD float widen(float16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  // Exponent and mantissa move to float32's places; a product with 2^112 then corrects the exponent's bias, for
  // subnormals too. Infinities and NaN, which that leaves finite, get their exponent back.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;
  return float_of(scaled | special | (x.bits & 0x8000u) << 16);
#endif
}

/* Round to nearest, halves to even, to the type of `out`. */
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
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  // normal results: rebias the exponent (127 - 15) and round away 13 bits
  const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  // below 2^-14: adding 1/2 leaves the rounded multiple of 2^-24 in the lowest bits
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  out.bits = static_cast<uint16_t>((magnitude >= 0x477ff000u ? special : finite) | (bits >> 16 & 0x8000u));
#endif
}

/* The type to compute in. */
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

/* Calls body with a null pointer of the type that dtype names, of those that are computed in float32. */
template <class Body>
int32_t with_float(int32_t dtype, Body body) {
  switch (dtype) {
    case NK_FLOAT16:
      return body(static_cast<float16*>(nullptr));
    case NK_BFLOAT16:
      return body(static_cast<bfloat16*>(nullptr));
    default:
      return body(static_cast<float*>(nullptr));
  }
}

/* The same of all types. */
template <class Body>
int32_t with_dtype(int32_t dtype, Body body) {
  return dtype == NK_FLOAT64 ? body(static_cast<double*>(nullptr)) : with_float(dtype, body);
}

NK_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace nk
