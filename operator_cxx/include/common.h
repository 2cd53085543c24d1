/* Definitions shared by all kernels of both libraries: host and device functions, and float arithmetic. */
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "necklace.h"

#ifdef __CUDACC__
#define NK_HD __host__ __device__ __forceinline__
#else
#define NK_HD inline __attribute__((always_inline))
#endif

namespace nk {

NK_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

/* Return a * b + c, rounded once if the processor has the instruction. Only calls of this function are fused: the
 * compilers are run without contraction, because IoUs that are equal on one device must be equal on all. */
NK_HD float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

}  // namespace nk
